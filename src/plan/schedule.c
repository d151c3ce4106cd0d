/* SPDX-License-Identifier: MIT */
/* Schedules: methods and their rules, making and reading them. */
#include "plan/schedule.h"
#include "base/error.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

typedef void generator(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);

static const struct {
    const char *name;
    generator *generate;
    int32_t phases;
    bool folded; /* a V: the second half of the stages comes back over the ranks */
} methods[EP_SCHEDULE_METHODS] = {
    [EP_SCHEDULE_1F1B] = {"1f1b", epi_schedule_1f1b, 1, false},
    [EP_SCHEDULE_INTERLEAVED] = {"interleaved", epi_schedule_interleaved, 2, false},
    [EP_SCHEDULE_ZB1P] = {"zb1p", epi_schedule_zb1p, 1, false},
    [EP_SCHEDULE_ZBV] = {"zbv", epi_schedule_zbv, 2, true},
    [EP_SCHEDULE_DUALPIPE] = {"dualpipe", epi_schedule_dualpipe, 2, false},
    [EP_SCHEDULE_DUALPIPEV] = {"dualpipev", epi_schedule_dualpipev, 2, true},
};

const char *ep_schedule_method_name(int32_t method)
{
    if (method == EP_SCHEDULE_CUSTOM)
        return "custom";
    return method >= 0 && method < EP_SCHEDULE_METHODS ? methods[method].name : "unknown";
}

/* "ZB-V" and "zb_v" are "zbv". */
static bool same_name(const char *given, const char *name)
{
    for (; *given; given++) {
        if (*given == '-' || *given == '_')
            continue;
        if (tolower((unsigned char)*given) != *name)
            return false;
        name++;
    }
    return *name == '\0';
}

ep_status ep_schedule_method_parse(const char *name, int32_t *method)
{
    if (!name || !method)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_method_parse: %s is NULL",
                        name ? "method" : "name");
    for (int32_t i = 0; i < EP_SCHEDULE_METHODS; i++) {
        if (same_name(name, methods[i].name)) {
            *method = i;
            return EP_OK;
        }
    }
    return epi_fail(EP_ERR_ARGUMENT,
                    "schedule method is \"%.40s\"; it can be 1f1b, interleaved, zb1p, zbv, "
                    "dualpipe or dualpipev",
                    name);
}

ep_status epi_take_config(const char *call, const void *config, void *into, size_t size)
{
    size_t given;
    if (!config)
        return epi_fail(EP_ERR_ARGUMENT, "%s: the configuration is NULL", call);
    memcpy(&given, config, sizeof given);
    if (given < sizeof given || given > size)
        return epi_fail(EP_ERR_ARGUMENT, "%s: size of the configuration is %zu; allowed %zu to %zu",
                        call, given, sizeof given, size);
    memcpy(into, config, given);
    return EP_OK;
}

static ep_status in_range(const char *call, const char *field, int32_t value, int32_t low,
                          int32_t high)
{
    if (value >= low && value <= high)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %d; allowed %d to %d", call, field, (int)value,
                    (int)low, (int)high);
}

/* What each method asks of R and C beyond the general bounds. */
static ep_status method_rules(const char *call, const ep_schedule_config *c)
{
    const char *name = methods[c->method].name;
    bool dual = c->method == EP_SCHEDULE_DUALPIPE, dualv = c->method == EP_SCHEDULE_DUALPIPEV;
    if (dual && c->ranks % 2 != 0)
        return epi_fail(EP_ERR_ARGUMENT, "%s: ranks is %d; %s allows even numbers from 2", call,
                        (int)c->ranks, name);
    if (dual && c->chunks % 2 != 0)
        return epi_fail(EP_ERR_ARGUMENT, "%s: chunks is %d; %s allows even numbers from %d", call,
                        (int)c->chunks, name, 2 * (int)c->ranks);
    if ((dual || dualv) && c->chunks < 2 * c->ranks)
        return epi_fail(EP_ERR_ARGUMENT, "%s: chunks is %d; %s with %d ranks allows %d to %d", call,
                        (int)c->chunks, name, (int)c->ranks, 2 * (int)c->ranks,
                        EP_SCHEDULE_MAX_CHUNKS);
    if (c->method == EP_SCHEDULE_INTERLEAVED && c->chunks % c->ranks != 0)
        return epi_fail(EP_ERR_ARGUMENT, "%s: chunks is %d; %s allows multiples of ranks (%d)",
                        call, (int)c->chunks, name, (int)c->ranks);
    if (c->method != EP_SCHEDULE_INTERLEAVED && c->model_chunks != 0)
        return epi_fail(EP_ERR_ARGUMENT, "%s: model_chunks is %d; %s allows only 0", call,
                        (int)c->model_chunks, name);
    return EP_OK;
}

static ep_status shape_of(const char *call, const ep_schedule_config *c, ep_schedule_shape *shape)
{
    EPI_TRY(in_range(call, "method", c->method, 0, EP_SCHEDULE_METHODS - 1));
    EPI_TRY(in_range(call, "ranks", c->ranks, 1, EP_SCHEDULE_MAX_RANKS));
    EPI_TRY(in_range(call, "chunks", c->chunks, 1, EP_SCHEDULE_MAX_CHUNKS));
    EPI_TRY(in_range(call, "model_chunks", c->model_chunks, 0, EP_SCHEDULE_MAX_PHASES));
    EPI_TRY(method_rules(call, c));
    int32_t streams = c->method == EP_SCHEDULE_DUALPIPE ? 2 : 1;
    int32_t phases = c->model_chunks ? c->model_chunks : methods[c->method].phases;
    *shape = (ep_schedule_shape){.method = c->method,
                                 .ranks = c->ranks,
                                 .phases = phases,
                                 .streams = streams,
                                 .stages = c->ranks * phases / streams,
                                 .chunks = c->chunks / streams};
    return EP_OK;
}

static void place(const ep_schedule_shape *shape, int32_t rank, int32_t phase, int32_t *stream,
                  int32_t *stage)
{
    int32_t mirror = shape->ranks - 1 - rank;
    *stream = 0;
    if (shape->method == EP_SCHEDULE_DUALPIPE) {
        /* Phase 0 is the stream that enters at the rank's nearer end. */
        *stream = rank < mirror ? phase : 1 - phase;
        *stage = *stream ? mirror : rank;
    } else {
        bool back = methods[shape->method].folded && phase == 1;
        *stage = phase * shape->ranks + (back ? mirror : rank);
    }
}

/* Arrays of the places, still to be filled. */
static ep_status allocate(const ep_schedule_shape *shape, ep_schedule **out)
{
    size_t places = (size_t)shape->ranks * (size_t)shape->phases;
    ep_schedule *s = calloc(1, sizeof *s);
    if (s) {
        s->shape = *shape;
        s->stage = calloc(places, sizeof *s->stage);
        s->stream = calloc(places, sizeof *s->stream);
        s->owner = malloc(places * sizeof *s->owner);
        s->first = calloc((size_t)shape->ranks + 1, sizeof *s->first);
    }
    if (!s || !s->stage || !s->stream || !s->owner || !s->first) {
        ep_schedule_destroy(s);
        return epi_fail(EP_ERR_MEMORY, "schedule: no memory for %zu places", places);
    }
    for (size_t i = 0; i < places; i++)
        s->owner[i] = -1;
    *out = s;
    return EP_OK;
}

static ep_status generate(ep_schedule *s)
{
    epi_builder b = {.chunks = s->shape.chunks, .status = EP_OK};
    for (int32_t rank = 0; rank < s->shape.ranks; rank++) {
        s->first[rank] = b.count;
        b.deferred = b.count;
        memset(b.forward, 0, sizeof b.forward);
        memset(b.backward, 0, sizeof b.backward);
        methods[s->shape.method].generate(&b, &s->shape, rank);
    }
    s->first[s->shape.ranks] = b.count;
    s->ops = b.ops;
    return b.status;
}

ep_status ep_schedule_create(const ep_schedule_config *config, ep_schedule **schedule)
{
    ep_schedule_config c = EP_SCHEDULE_CONFIG_INIT;
    ep_schedule_shape shape;
    ep_schedule *s;
    if (!schedule)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_create: schedule is NULL");
    EPI_TRY(epi_take_config("ep_schedule_create", config, &c, sizeof c));
    EPI_TRY(shape_of("ep_schedule_create", &c, &shape));
    EPI_TRY(allocate(&shape, &s));
    for (int32_t i = 0; i < epi_schedule_places(s); i++) {
        place(&shape, i / shape.phases, i % shape.phases, &s->stream[i], &s->stage[i]);
        s->owner[s->stream[i] * shape.stages + s->stage[i]] = i;
    }
    s->proven = true;
    ep_status status = generate(s);
    if (status == EP_OK)
        status = epi_schedule_derive(s);
    if (status != EP_OK) {
        ep_schedule_destroy(s);
        return status;
    }
    *schedule = s;
    return EP_OK;
}

void ep_schedule_destroy(ep_schedule *s)
{
    if (!s)
        return;
    free(s->stage);
    free(s->stream);
    free(s->owner);
    free(s->first);
    free(s->ops);
    free(s);
}

static ep_status layout_shape(const ep_schedule_layout *l, ep_schedule_shape *shape)
{
    const char *call = "ep_schedule_assemble";
    EPI_TRY(in_range(call, "ranks", l->ranks, 1, EP_SCHEDULE_MAX_RANKS));
    EPI_TRY(in_range(call, "phases", l->phases, 1, EP_SCHEDULE_MAX_PHASES));
    EPI_TRY(in_range(call, "streams", l->streams, 1, 2));
    EPI_TRY(in_range(call, "chunks", l->chunks, 1, EP_SCHEDULE_MAX_CHUNKS));
    int32_t places = l->ranks * l->phases;
    if (l->stages < 1 || l->stages > places || l->stages * l->streams != places)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: stages is %d; ranks * phases (%d) over streams (%d) is allowed", call,
                        (int)l->stages, (int)places, (int)l->streams);
    if (!l->stage)
        return epi_fail(EP_ERR_ARGUMENT, "%s: stage is NULL", call);
    *shape = (ep_schedule_shape){.method = EP_SCHEDULE_CUSTOM,
                                 .ranks = l->ranks,
                                 .phases = l->phases,
                                 .streams = l->streams,
                                 .stages = l->stages,
                                 .chunks = l->chunks};
    return EP_OK;
}

static ep_status take_places(ep_schedule *s, const ep_schedule_layout *l)
{
    for (int32_t i = 0; i < epi_schedule_places(s); i++) {
        int32_t rank = i / l->phases, phase = i % l->phases;
        s->stage[i] = l->stage[i];
        s->stream[i] = l->stream ? l->stream[i] : 0;
        if (s->stage[i] < 0 || s->stage[i] >= l->stages || s->stream[i] < 0 ||
            s->stream[i] >= l->streams)
            return epi_fail(EP_ERR_ARGUMENT,
                            "ep_schedule_assemble: rank %d phase %d has stream %d, stage %d; "
                            "allowed 0 to %d and 0 to %d",
                            (int)rank, (int)phase, (int)s->stream[i], (int)s->stage[i],
                            (int)l->streams - 1, (int)l->stages - 1);
        int32_t *owner = &s->owner[s->stream[i] * l->stages + s->stage[i]];
        if (*owner >= 0)
            return epi_fail(EP_ERR_ARGUMENT,
                            "ep_schedule_assemble: stream %d, stage %d is on rank %d and on rank "
                            "%d; allowed once",
                            (int)s->stream[i], (int)s->stage[i], (int)(*owner / l->phases),
                            (int)rank);
        *owner = i;
    }
    return EP_OK;
}

static ep_status bad_field(int32_t rank, size_t position, const char *field, int32_t value,
                           int32_t high)
{
    return epi_fail(EP_ERR_ARGUMENT,
                    "ep_schedule_assemble: rank %d, position %zu: %s is %d; allowed 0 to %d",
                    (int)rank, position, field, (int)value, (int)high);
}

static ep_status examine(const ep_schedule_shape *shape, int32_t rank, size_t position,
                         const ep_schedule_op *op, bool derive)
{
    bool moves = op->kind == EP_OP_SEND || op->kind == EP_OP_RECV;
    int32_t last = derive ? EP_OP_PAIR : EP_OP_RECV;
    if (op->kind > last)
        return bad_field(rank, position, "kind", op->kind, last);
    if (op->phase >= shape->phases)
        return bad_field(rank, position, "phase", op->phase, shape->phases - 1);
    if (op->chunk < 0 || op->chunk >= shape->chunks)
        return bad_field(rank, position, "chunk", op->chunk, shape->chunks - 1);
    if (op->kind == EP_OP_PAIR && op->back_phase >= shape->phases)
        return bad_field(rank, position, "back_phase", op->back_phase, shape->phases - 1);
    if (op->kind == EP_OP_PAIR && (op->back_chunk < 0 || op->back_chunk >= shape->chunks))
        return bad_field(rank, position, "back_chunk", op->back_chunk, shape->chunks - 1);
    if (moves && op->payload > EP_PAYLOAD_GRADIENT)
        return bad_field(rank, position, "payload", op->payload, EP_PAYLOAD_GRADIENT);
    if (moves && (op->peer < 0 || op->peer >= shape->ranks))
        return bad_field(rank, position, "peer", op->peer, shape->ranks - 1);
    return EP_OK;
}

static ep_status take_ops(ep_schedule *s, const ep_schedule_op *ops, const size_t *count,
                          bool derive)
{
    for (int32_t rank = 0; rank < s->shape.ranks; rank++) {
        s->first[rank + 1] = s->first[rank] + count[rank];
        for (size_t i = 0; i < count[rank]; i++)
            EPI_TRY(examine(&s->shape, rank, i, &ops[s->first[rank] + i], derive));
    }
    size_t total = s->first[s->shape.ranks];
    s->ops = malloc((total ? total : 1) * sizeof *s->ops);
    if (!s->ops)
        return epi_fail(EP_ERR_MEMORY, "schedule: no memory for %zu operations", total);
    if (total)
        memcpy(s->ops, ops, total * sizeof *s->ops);
    return derive ? epi_schedule_derive(s) : EP_OK;
}

ep_status ep_schedule_assemble(const ep_schedule_layout *layout, const ep_schedule_op *ops,
                               const size_t *count, int derive, ep_schedule **schedule)
{
    ep_schedule_layout l = {0};
    ep_schedule_shape shape;
    ep_schedule *s;
    if (!ops || !count || !schedule)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_assemble: %s is NULL",
                        !ops     ? "ops"
                        : !count ? "count"
                                 : "schedule");
    EPI_TRY(epi_take_config("ep_schedule_assemble", layout, &l, sizeof l));
    EPI_TRY(layout_shape(&l, &shape));
    EPI_TRY(allocate(&shape, &s));
    ep_status status = take_places(s, &l);
    if (status == EP_OK)
        status = take_ops(s, ops, count, derive != 0);
    if (status != EP_OK) {
        ep_schedule_destroy(s);
        return status;
    }
    *schedule = s;
    return EP_OK;
}

static ep_status rank_of(const char *call, const ep_schedule *s, int32_t rank)
{
    if (!s)
        return epi_fail(EP_ERR_ARGUMENT, "%s: schedule is NULL", call);
    return in_range(call, "rank", rank, 0, s->shape.ranks - 1);
}

ep_status ep_schedule_get_shape(const ep_schedule *s, ep_schedule_shape *shape)
{
    if (!s || !shape)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_get_shape: %s is NULL",
                        s ? "shape" : "schedule");
    *shape = s->shape;
    return EP_OK;
}

ep_status ep_schedule_place(const ep_schedule *s, int32_t rank, int32_t phase, int32_t *stream,
                            int32_t *stage)
{
    EPI_TRY(rank_of("ep_schedule_place", s, rank));
    EPI_TRY(in_range("ep_schedule_place", "phase", phase, 0, s->shape.phases - 1));
    int32_t at = rank * s->shape.phases + phase;
    if (stream)
        *stream = s->stream[at];
    if (stage)
        *stage = s->stage[at];
    return EP_OK;
}

ep_status ep_schedule_ops(const ep_schedule *s, int32_t rank, const ep_schedule_op **ops,
                          size_t *count, size_t *first)
{
    EPI_TRY(rank_of("ep_schedule_ops", s, rank));
    if (!ops || !count)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_ops: %s is NULL", ops ? "count" : "ops");
    *ops = s->ops + s->first[rank];
    *count = s->first[rank + 1] - s->first[rank];
    if (first)
        *first = s->first[rank];
    return EP_OK;
}
