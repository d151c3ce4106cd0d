/* SPDX-License-Identifier: MIT */
/* entrepot info: what this build and this machine have. Nothing is taken on trust: a transport
   or device works when something could be made on it. */
#include "bench.h"
#include "commands.h"
#include "exit.h"
#include "json.h"
#include "options.h"

#include "entrepot/codec.h"
#include "entrepot/ep.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define TEXT_MAX 512

static const char *const transports[] = {"shm", "threads"};
#define NUM_TRANSPORTS (sizeof transports / sizeof transports[0])

/* Something that works, or why it does not. */
typedef struct finding {
    bool works;
    char why_not[TEXT_MAX];
} finding;

typedef struct info {
    char cpu[TEXT_MAX];
    int cores;
    int64_t memory_bytes;
    finding transport[NUM_TRANSPORTS];
    finding cuda;
} info;

static void find_cpu(info *i)
{
    char line[TEXT_MAX];
    cpu_set_t set;
    snprintf(i->cpu, sizeof i->cpu, "unknown");
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "model name : %511[^\n]", i->cpu) == 1)
            break;
    }
    if (file)
        fclose(file);
    bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    i->cores = known ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    i->memory_bytes = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
}

static finding note(ep_status status)
{
    finding f = {status == EP_OK, ""};
    if (!f.works)
        snprintf(f.why_not, sizeof f.why_not, "%s", ep_last_error());
    return f;
}

/* A group of this process alone. */
static ep_status make_group(const char *transport, ep_thread_world *world, ep_group **group)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = 0;
    config.num_ranks = 1;
    config.transport = transport;
    config.world = world;
    return ep_group_create(&config, group);
}

static finding try_transport(const char *name)
{
    ep_group *group = NULL;
    ep_thread_world *world = NULL;
    ep_status status = EP_OK;
    if (strcmp(name, "threads") == 0)
        status = ep_thread_world_create(1, &world);
    if (status == EP_OK)
        status = make_group(name, world, &group);
    finding f = note(status);
    ep_group_destroy(group);
    ep_thread_world_destroy(world);
    return f;
}

static finding try_cuda(void)
{
    ep_group *group = NULL;
    ep_buffer *buffer = NULL;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.device = EP_DEVICE_CUDA;
    ep_status status = make_group("shm", NULL, &group);
    if (status == EP_OK)
        status = ep_buffer_create(group, &config, &buffer);
    finding f = note(status);
    ep_buffer_destroy(buffer);
    ep_group_destroy(group);
    return f;
}

static void json_finding(json *j, const finding *f)
{
    json_bool(j, "works", f->works);
    json_text(j, "why_not", f->works ? NULL : f->why_not);
}

static int print_json(const info *i)
{
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_text(&j, "version", ep_version());
    json_text(&j, "command_version", EP_VERSION_STRING);
    json_text(&j, "compiler", __VERSION__);
    json_open_object(&j, "cpu");
    json_text(&j, "model", i->cpu);
    json_integer(&j, "cores", i->cores);
    json_integer(&j, "memory_bytes", i->memory_bytes);
    json_text(&j, "features", ep_cpu_features());
    json_text(&j, "kernels", ep_codec_isa());
    json_close_object(&j);
    json_open_array(&j, "transports");
    for (size_t t = 0; t < NUM_TRANSPORTS; t++) {
        json_open_object(&j, NULL);
        json_text(&j, "name", transports[t]);
        json_finding(&j, &i->transport[t]);
        json_close_object(&j);
    }
    json_close_array(&j);
    json_open_object(&j, "cuda");
    json_finding(&j, &i->cuda);
    json_close_object(&j);
    json_bool(&j, "mpi_baseline", bench_baseline_present());
    json_close_object(&j);
    return json_finish(&j) ? EXIT_OK : EXIT_RUNTIME;
}

static void print_finding(const char *name, const finding *f)
{
    printf("%-12s %s%s\n", name, f->works ? "works" : "no: ", f->why_not);
}

static int print_text(const info *i)
{
    printf("entrepot     %s (command %s, compiler %s)\n", ep_version(), EP_VERSION_STRING,
           __VERSION__);
    printf("cpu          %s, %d cores usable, %.1f GiB\n", i->cpu, i->cores,
           (double)i->memory_bytes / (1 << 30));
    printf("kernels      %s (processor has: %s)%s%s\n", ep_codec_isa(), ep_cpu_features(),
           ep_codec_isa_note()[0] ? "; " : "", ep_codec_isa_note());
    for (size_t t = 0; t < NUM_TRANSPORTS; t++)
        print_finding(transports[t], &i->transport[t]);
    print_finding("cuda", &i->cuda);
    printf("mpi baseline %s\n", bench_baseline_present() ? "built" : "not built");
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_RUNTIME;
}

int cmd_info(int argc, char **argv)
{
    bool as_json = false;
    const option table[] = {OPTION_SWITCH("json", &as_json, "one JSON object on standard output")};
    const options_spec spec = {
        "entrepot info", "[options]", "Shows what this build and this machine have.",
        table,           1,           false};
    int code;
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code;
    info i = {.cores = 0};
    find_cpu(&i);
    for (size_t t = 0; t < NUM_TRANSPORTS; t++)
        i.transport[t] = try_transport(transports[t]);
    i.cuda = try_cuda();
    return as_json ? print_json(&i) : print_text(&i);
}
