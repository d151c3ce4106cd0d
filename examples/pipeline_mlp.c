/* SPDX-License-Identifier: MIT */
/*
 * Trains a small MLP as a pipeline, with every schedule in turn, and compares the
 * gradients of each step with those of a sequential run of the same model.
 *
 *   entrepot run -n 4 -- pipeline_mlp     ranks are processes
 *   pipeline_mlp 4                        ranks are threads of one process
 *
 * Every schedule adds the gradients of a stage chunk by chunk in their order, as
 * the sequential run does, so the sums are the same bit for bit. DualPipe keeps two
 * copies of each stage, one per direction, whose sums are added at the end: it
 * equals bit for bit a sequential run that adds in that order, and the plain one to
 * 1e-12.
 */
#include <entrepot/pipeline.h>

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WIDTH = 16,
    ROWS = 4, /* of a micro-batch */
    STEPS = 4,
    LAYER = WIDTH * WIDTH + WIDTH, /* weights, then biases */
    MAX_RANKS = 16,
    MESSAGE = ROWS * WIDTH
};

/* One rank's copy of everything. Arrays by layer and micro-batch hold MESSAGE numbers each. */
typedef struct model {
    int layers, chunks;        /* micro-batches of a step */
    int stages, stream_chunks; /* of the schedule that runs */
    double *parameters;        /* [layers][LAYER] */
    double *gradients;         /* [2 streams][layers][LAYER] */
    double *data, *target;     /* [chunks] */
    double *value;             /* [layers + 1][chunks]: a layer's input, its output after it */
    double *delta;             /* [layers][chunks]: gradient before the layer's tanh */
    double loss;               /* of the micro-batches whose last stage is here */
} model;

static double *at(double *base, const model *m, int layer, int chunk)
{
    return base + ((size_t)layer * (size_t)m->chunks + (size_t)chunk) * MESSAGE;
}

static double random_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(*state >> 11) / (double)(1ll << 53) - 0.5;
}

static void layer_forward(model *m, int layer, int chunk)
{
    const double *w = m->parameters + (size_t)layer * LAYER, *x = at(m->value, m, layer, chunk);
    double *y = at(m->value, m, layer + 1, chunk);
    for (int row = 0; row < ROWS; row++) {
        for (int j = 0; j < WIDTH; j++) {
            double sum = w[WIDTH * WIDTH + j];
            for (int i = 0; i < WIDTH; i++)
                sum += x[row * WIDTH + i] * w[i * WIDTH + j];
            y[row * WIDTH + j] = tanh(sum);
        }
    }
}

/* Turns the gradient of the layer's output, in `grad`, into that of its input. */
static void layer_input_grad(model *m, int layer, int chunk, double *grad)
{
    const double *w = m->parameters + (size_t)layer * LAYER, *y = at(m->value, m, layer + 1, chunk);
    double *delta = at(m->delta, m, layer, chunk);
    for (int i = 0; i < MESSAGE; i++)
        delta[i] = grad[i] * (1 - y[i] * y[i]);
    for (int row = 0; row < ROWS; row++) {
        for (int i = 0; i < WIDTH; i++) {
            double sum = 0;
            for (int j = 0; j < WIDTH; j++)
                sum += delta[row * WIDTH + j] * w[i * WIDTH + j];
            grad[row * WIDTH + i] = sum;
        }
    }
}

static void layer_weight_grad(model *m, int layer, int chunk, int stream)
{
    double *g = m->gradients + ((size_t)stream * (size_t)m->layers + (size_t)layer) * LAYER;
    const double *x = at(m->value, m, layer, chunk), *delta = at(m->delta, m, layer, chunk);
    for (int row = 0; row < ROWS; row++) {
        for (int j = 0; j < WIDTH; j++) {
            for (int i = 0; i < WIDTH; i++)
                g[i * WIDTH + j] += x[row * WIDTH + i] * delta[row * WIDTH + j];
            g[WIDTH * WIDTH + j] += delta[row * WIDTH + j];
        }
    }
}

/* Streams share the data: the second takes the later micro-batches. */
static int chunk_of(const model *m, const ep_pipeline_step *step)
{
    return step->stream * m->stream_chunks + step->chunk;
}

static ep_status forward(void *context, const ep_pipeline_step *step, const void *input,
                         void *output)
{
    model *m = context;
    int chunk = chunk_of(m, step), per_stage = m->layers / m->stages;
    int first = step->stage * per_stage, end = first + per_stage;
    memcpy(at(m->value, m, first, chunk), input ? input : at(m->data, m, 0, chunk),
           MESSAGE * sizeof(double));
    for (int layer = first; layer < end; layer++)
        layer_forward(m, layer, chunk);
    const double *y = at(m->value, m, end, chunk), *t = at(m->target, m, 0, chunk);
    if (output)
        memcpy(output, y, MESSAGE * sizeof(double));
    for (int i = 0; !output && i < MESSAGE; i++)
        m->loss += (y[i] - t[i]) * (y[i] - t[i]) / (2 * ROWS * m->chunks);
    return EP_OK;
}

static ep_status input_grad(void *context, const ep_pipeline_step *step, const void *output_grad,
                            void *into)
{
    model *m = context;
    int chunk = chunk_of(m, step), per_stage = m->layers / m->stages;
    int first = step->stage * per_stage, end = first + per_stage;
    double grad[MESSAGE];
    const double *y = at(m->value, m, end, chunk), *t = at(m->target, m, 0, chunk);
    if (output_grad)
        memcpy(grad, output_grad, sizeof grad);
    for (int i = 0; !output_grad && i < MESSAGE; i++)
        grad[i] = (y[i] - t[i]) / (ROWS * m->chunks);
    for (int layer = end - 1; layer >= first; layer--)
        layer_input_grad(m, layer, chunk, grad);
    if (into)
        memcpy(into, grad, sizeof grad);
    return EP_OK;
}

static ep_status weight_grad(void *context, const ep_pipeline_step *step)
{
    model *m = context;
    int per_stage = m->layers / m->stages;
    for (int i = 0; i < per_stage; i++)
        layer_weight_grad(m, step->stage * per_stage + i, chunk_of(m, step), step->stream);
    return EP_OK;
}

static ep_status backward(void *context, const ep_pipeline_step *step, const void *output_grad,
                          void *into)
{
    ep_status status = input_grad(context, step, output_grad, into);
    return status == EP_OK ? weight_grad(context, step) : status;
}

/* Here is where a model overlaps the computation of one with the dispatch and
 * combine of the other. */
static ep_status overlapped(void *context, const ep_pipeline_step *forward_step, const void *input,
                            void *output, const ep_pipeline_step *backward_step,
                            const void *output_grad, void *into)
{
    ep_status status = forward(context, forward_step, input, output);
    return status == EP_OK ? backward(context, backward_step, output_grad, into) : status;
}

static void start_step(model *m, int stages, int stream_chunks)
{
    m->stages = stages;
    m->stream_chunks = stream_chunks;
    m->loss = 0;
    memset(m->gradients, 0, 2 * (size_t)m->layers * LAYER * sizeof(double));
}

/* All micro-batches in their order, each added to the sum of its stream. */
static void sequential(model *m, int streams)
{
    start_step(m, 1, m->chunks / streams);
    for (int chunk = 0; chunk < m->chunks; chunk++) {
        const ep_pipeline_step step = {0, chunk / m->stream_chunks, chunk % m->stream_chunks, 0};
        forward(m, &step, NULL, NULL);
        backward(m, &step, NULL, NULL);
    }
    size_t count = (size_t)m->layers * LAYER;
    for (size_t i = 0; i < count; i++)
        m->gradients[i] += m->gradients[count + i];
}

static bool model_create(model *m, int layers, int chunks)
{
    size_t parameters = (size_t)layers * LAYER, message = (size_t)chunks * MESSAGE;
    uint64_t seed = 1;
    *m = (model){.layers = layers, .chunks = chunks};
    m->parameters = malloc(parameters * sizeof(double));
    m->gradients = malloc(2 * parameters * sizeof(double));
    m->data = malloc(message * sizeof(double));
    m->target = malloc(message * sizeof(double));
    m->value = malloc((size_t)(layers + 1) * message * sizeof(double));
    m->delta = malloc((size_t)layers * message * sizeof(double));
    if (!m->parameters || !m->gradients || !m->data || !m->target || !m->value || !m->delta)
        return false;
    for (size_t i = 0; i < parameters; i++)
        m->parameters[i] = random_number(&seed);
    for (size_t i = 0; i < message; i++) {
        m->data[i] = 2 * random_number(&seed);
        m->target[i] = random_number(&seed);
    }
    return true;
}

static void model_destroy(model *m)
{
    free(m->parameters);
    free(m->gradients);
    free(m->data);
    free(m->target);
    free(m->value);
    free(m->delta);
}

/* Sums what the ranks hold: of each stream's stage exactly one rank has the gradient, the others
 * zero; then the streams are added. all has room for every rank's gradients and loss. */
static ep_status sum_over_ranks(ep_group *group, const model *m, double *all, double *sum,
                                double *loss)
{
    int ranks = ep_group_num_ranks(group);
    size_t one = (size_t)m->layers * LAYER;
    ep_status status = ep_group_allgather(group, &m->loss, all, sizeof(double));
    *loss = 0;
    for (int rank = 0; status == EP_OK && rank < ranks; rank++)
        *loss += all[rank];
    memset(sum, 0, one * sizeof(double));
    for (size_t stream = 0; status == EP_OK && stream < 2; stream++) {
        status = ep_group_allgather(group, m->gradients + stream * one, all, one * sizeof(double));
        for (size_t i = 0; status == EP_OK && i < one; i++) {
            double of_stream = 0;
            for (int rank = 0; rank < ranks; rank++)
                of_stream += all[(size_t)rank * one + i];
            sum[i] += of_stream;
        }
    }
    return status;
}

/* Largest difference relative to the largest gradient; 0 only when all are equal. */
static double difference(const double *a, const double *b, size_t count)
{
    double apart = 0, most = 0;
    for (size_t i = 0; i < count; i++) {
        apart = fmax(apart, fabs(a[i] - b[i]));
        most = fmax(most, fabs(b[i]));
    }
    return apart / most;
}

/* What a run of one schedule found. */
typedef struct findings {
    double first_loss, last_loss;
    double apart; /* from the sequential run */
    bool exact;   /* equal to the sequential run that adds in the same order */
} findings;

static ep_status train(ep_group *group, const ep_schedule *schedule, model *m, model *reference,
                       double *all, double *sum, findings *f)
{
    const ep_pipeline_config config = {sizeof config, MESSAGE * sizeof(double), 0};
    const ep_pipeline_callbacks callbacks = {sizeof callbacks, m,           forward,   backward,
                                             input_grad,       weight_grad, overlapped};
    ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
    ep_schedule_shape shape;
    size_t count = (size_t)m->layers * LAYER;
    ep_status status = ep_schedule_get_shape(schedule, &shape);
    if (status == EP_OK)
        status = ep_pipeline_link_open(group, schedule, &config, &link);
    for (int step = 0; status == EP_OK && step < STEPS; step++) {
        double loss;
        start_step(m, shape.stages, shape.chunks);
        status = ep_pipeline_run(schedule, ep_group_rank(group), &config, &callbacks, &link);
        if (status == EP_OK)
            status = sum_over_ranks(group, m, all, sum, &loss);
        if (status != EP_OK)
            break;
        memcpy(reference->parameters, m->parameters, count * sizeof(double));
        sequential(reference, shape.streams);
        f->exact &= difference(sum, reference->gradients, count) == 0;
        sequential(reference, 1);
        f->apart = fmax(f->apart, difference(sum, reference->gradients, count));
        *(step ? &f->last_loss : &f->first_loss) = loss;
        for (size_t i = 0; i < count; i++)
            m->parameters[i] -= 0.05 * sum[i];
    }
    ep_pipeline_link_close(&link);
    return status;
}

/* Returns 0 when the gradients are as close as they must be. */
static int try_method(ep_group *group, int32_t method)
{
    ep_schedule_config config = EP_SCHEDULE_CONFIG_INIT;
    int ranks = ep_group_num_ranks(group), first = ep_group_rank(group) == 0, bad = 1;
    ep_schedule *schedule = NULL;
    model m = {0}, reference = {0};
    findings f = {.exact = true};
    config.method = method;
    config.ranks = ranks;
    config.chunks = 4 * ranks;
    if (ep_schedule_create(&config, &schedule) != EP_OK) {
        if (first)
            printf("%-12s left out: %s\n", ep_schedule_method_name(method), ep_last_error());
        return 0;
    }
    size_t count = 2 * (size_t)ranks * LAYER; /* two layers a rank: every method can cut there */
    double *all = malloc((size_t)ranks * count * sizeof(double));
    double *sum = malloc(count * sizeof(double));
    ep_status status = EP_ERR_MEMORY;
    if (all && sum && model_create(&m, 2 * ranks, config.chunks) &&
        model_create(&reference, 2 * ranks, config.chunks))
        status = train(group, schedule, &m, &reference, all, sum, &f);
    if (status != EP_OK) {
        fprintf(stderr, "%s: %s: %s\n", ep_schedule_method_name(method), ep_status_string(status),
                ep_last_error());
    } else {
        bad = !f.exact || !(f.apart <= (method == EP_SCHEDULE_DUALPIPE ? 1e-12 : 0)) ||
              !(f.last_loss < f.first_loss);
        if (first)
            printf("%-12s loss %.6f -> %.6f, gradients %s; %.1e from the sequential run%s\n",
                   ep_schedule_method_name(method), f.first_loss, f.last_loss,
                   f.exact ? "equal bit for bit in the same order of additions" : "differ", f.apart,
                   bad ? "; BAD" : "");
    }
    free(all);
    free(sum);
    model_destroy(&m);
    model_destroy(&reference);
    ep_schedule_destroy(schedule);
    return bad;
}

static int run_rank(const ep_group_config *config)
{
    ep_group *group;
    int bad = 0;
    if (ep_group_create(config, &group) != EP_OK) {
        fprintf(stderr, "%s\n", ep_last_error());
        return 1;
    }
    if (ep_group_num_ranks(group) > MAX_RANKS) {
        fprintf(stderr, "%d ranks; this example takes 1 to %d\n", ep_group_num_ranks(group),
                MAX_RANKS);
        bad = 1;
    }
    for (int32_t method = 0; !bad && method < EP_SCHEDULE_METHODS; method++)
        bad = try_method(group, method);
    ep_group_destroy(group);
    return bad;
}

typedef struct thread_rank {
    pthread_t thread;
    ep_group_config config;
    int bad;
} thread_rank;

static void *run_thread(void *argument)
{
    thread_rank *t = argument;
    t->bad = run_rank(&t->config);
    return NULL;
}

static int run_threads(int ranks)
{
    thread_rank threads[MAX_RANKS];
    ep_thread_world *world;
    int started = 0, bad = 0;
    if (ep_thread_world_create(ranks, &world) != EP_OK) {
        fprintf(stderr, "%s\n", ep_last_error());
        return 1;
    }
    for (; started < ranks; started++) {
        thread_rank *t = &threads[started];
        t->config = (ep_group_config)EP_GROUP_CONFIG_INIT;
        t->config.rank = started;
        t->config.world = world;
        if (pthread_create(&t->thread, NULL, run_thread, t) != 0)
            break;
    }
    for (int i = 0; i < started; i++) {
        pthread_join(threads[i].thread, NULL);
        bad |= threads[i].bad;
    }
    ep_thread_world_destroy(world);
    return bad || started < ranks;
}

int main(int argc, char **argv)
{
    const ep_group_config from_environment = EP_GROUP_CONFIG_INIT;
    int threads = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2 || (argc > 1 && (threads < 1 || threads > MAX_RANKS))) {
        fprintf(stderr, "usage: %s [THREADS], 1 to %d\n", argv[0], MAX_RANKS);
        return 2;
    }
    return threads ? run_threads(threads) : run_rank(&from_environment);
}
