/* SPDX-License-Identifier: MIT */
/* What is said when the CUDA module can't be opened. Each case is a copy of this program, run where
   the files around it are what the case wants. */
#include "device/module.h"

#include "support/command.h"
#include "support/test.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DAMAGED "libentrepot_cuda.so"

static char folder[] = "/tmp/entrepot-module.XXXXXX";

/* As the copy: why there is no module, on standard output. */
static int look(void)
{
    const epi_module *module;
    puts(epi_cuda_module(&module) == EP_OK ? "opened" : ep_last_error());
    return 0;
}

static const char *in_folder(const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const void *data, size_t bytes, mode_t mode)
{
    int file = open(in_folder(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    assert_true(file >= 0);
    assert_int_equal(write(file, data, bytes), (ssize_t)bytes);
    close(file);
}

static int set_up(void **state)
{
    struct stat self;
    (void)state;
    assert_non_null(mkdtemp(folder));
    static const char *const folders[] = {"bin", "bin/lib", "lib"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        assert_int_equal(mkdir(in_folder(folders[i]), 0700), 0);
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    assert_int_equal(fstat(file, &self), 0);
    void *data = malloc((size_t)self.st_size);
    assert_int_equal(read(file, data, (size_t)self.st_size), self.st_size);
    write_file("bin/look", data, (size_t)self.st_size, 0700);
    free(data);
    close(file);
    return 0;
}

static int tear_down(void **state)
{
    static const char *const names[] = {"bin/look", "bin/lib", "bin", "lib"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        remove(in_folder(names[i]));
    return rmdir(folder);
}

/* What the copy prints with EP_CUDA_MODULE so, NULL: not set. */
static command_result run(const char *named)
{
    char variable[256];
    snprintf(variable, sizeof variable, "EP_CUDA_MODULE=%s", named ? named : "");
    const char *argv[] = {"env", variable, in_folder("bin/look"), "look", NULL};
    command_result r = command_run(argv);
    assert_int_equal(r.code, 0);
    return r;
}

/* Wherever a damaged file lies, it is what is told of, and not the places after it without any. */
static void a_damaged_file_is_the_reason(void **state)
{
    static const char *const places[] = {"bin/" DAMAGED, "lib/" DAMAGED, "bin/lib/" DAMAGED};
    (void)state;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        write_file(places[i], "?", 1, 0600);
        command_result r = run(NULL);
        unlink(in_folder(places[i]));
        assert_non_null(strstr(r.out, "CUDA support could not be opened: /tmp/entrepot-module."));
        assert_non_null(strstr(r.out, DAMAGED ": file too short"));
        command_free(&r);
    }
}

static void no_file_is_the_reason(void **state)
{
    (void)state;
    command_result r = run(NULL);
    assert_string_equal(r.out, "CUDA support could not be opened: " DAMAGED
                               ": cannot open shared object file: No such file or directory\n");
    command_free(&r);
}

static void a_named_file_and_its_variable_are_told(void **state)
{
    static const char *const cases[][2] = {
        {"/nonexistent.so", "/nonexistent.so: cannot open shared object file"},
        {"libm.so.6", "/libm.so.6 is no CUDA module of this library"},
        {EP_BINARY_DIR "/lib/libbroken_module.so", "opened"}, /* what is wrong shows later */
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        command_result r = run(cases[i][0]);
        assert_non_null(strstr(r.out, cases[i][1]));
        if (strcmp(cases[i][1], "opened") != 0)
            assert_memory_equal(r.out, "CUDA support could not be opened: EP_CUDA_MODULE: /", 51);
        command_free(&r);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_damaged_file_is_the_reason),
        cmocka_unit_test(no_file_is_the_reason),
        cmocka_unit_test(a_named_file_and_its_variable_are_told),
    };
    if (argc > 1 && strcmp(argv[1], "look") == 0)
        return look();
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
