/* SPDX-License-Identifier: MIT */
/* A pipeline schedule as SVG. */
#include "plan_pipeline.h"

#include <math.h>
#include <string.h>

enum {
    LEFT = 62,      /* for the rows' names */
    RIGHT = 104,    /* for bubble and live activations */
    TOP = 78,       /* for title, figures and column heads */
    ROW = 30,       /* pitch of the rows */
    BOX = 26,       /* height of a box */
    BELOW = 86,     /* for the axis and the legend */
    LEAST_BOX = 19, /* width at which two digits read well */
    WIDEST = 6000   /* of the time axis; beyond, boxes shrink and lose their numbers */
};

/* Colours by kind; the second is of phases other than 0. */
static const struct {
    const char *name;
    const char *fill[2], *ink[2];
} looks[] = {
    [EP_OP_FORWARD] = {"forward", {"#f7b267", "#e8871e"}, {"#3b2300", "#2e1a00"}},
    [EP_OP_BACKWARD] = {"backward", {"#8cc98f", "#4f9d5c"}, {"#0c2e10", "#ffffff"}},
    [EP_OP_INPUT_GRAD] = {"backward for input", {"#a5d3dc", "#5aa7b8"}, {"#08303a", "#08262e"}},
    [EP_OP_WEIGHT_GRAD] = {"backward for weights", {"#b9b3e3", "#8378c9"}, {"#221a55", "#ffffff"}},
};

typedef struct drawing {
    FILE *out;
    const ep_schedule *schedule;
    const pipeline_figures *figures;
    ep_schedule_shape shape;
    double scale; /* pixels per unit of time */
} drawing;

static const char *title_of(int32_t method)
{
    static const char *const titles[] = {"1F1B", "Interleaved 1F1B", "ZB1P",
                                         "ZB-V", "DualPipe",         "DualPipeV"};
    return method < EP_SCHEDULE_METHODS ? titles[method] : "Pipeline schedule";
}

static int computes(const ep_schedule_op *op)
{
    return op->kind != EP_OP_SEND && op->kind != EP_OP_RECV;
}

static double shortest_box(const drawing *d)
{
    double shortest = d->figures->makespan;
    for (int32_t rank = 0; rank < d->shape.ranks; rank++) {
        const ep_schedule_op *ops;
        size_t count, first;
        if (ep_schedule_ops(d->schedule, rank, &ops, &count, &first) != EP_OK)
            continue;
        for (size_t i = 0; i < count; i++) {
            double length = d->figures->end[first + i] - d->figures->start[first + i];
            if (computes(&ops[i]) && length > 0 && length < shortest)
                shortest = length;
        }
    }
    return shortest;
}

/* Micro-batches are numbered through: the second stream after the first. */
static int32_t number_of(const drawing *d, int32_t rank, int phase, int32_t chunk)
{
    int32_t stream = 0;
    ep_schedule_place(d->schedule, rank, phase, &stream, NULL);
    return stream * d->shape.chunks + chunk;
}

static int shade_of(const drawing *d, int32_t rank, int phase)
{
    int32_t stream = 0;
    ep_schedule_place(d->schedule, rank, phase, &stream, NULL);
    return d->shape.streams > 1 ? stream : phase > 0;
}

static void box(const drawing *d, double x, double y, double width, double height, int kind,
                int shade, int32_t number)
{
    int digits = number > 999 ? 4 : number > 99 ? 3 : number > 9 ? 2 : 1;
    double size = height < BOX ? 9.5 : 11;
    fprintf(d->out,
            "<rect x='%.2f' y='%.2f' width='%.2f' height='%.2f' fill='%s' stroke='#fff' "
            "stroke-width='.7'/>\n",
            x, y, width, height, looks[kind].fill[shade]);
    if (width >= digits * size * .58 + 2)
        fprintf(d->out, "<text x='%.2f' y='%.2f' font-size='%.1f' class='n' fill='%s'>%d</text>\n",
                x + width / 2, y + height / 2 + size * .36, size, looks[kind].ink[shade],
                (int)number);
}

static void draw_op(const drawing *d, int32_t rank, const ep_schedule_op *op, size_t index)
{
    double x = LEFT + d->figures->start[index] * d->scale, y = TOP + rank * ROW;
    double width = (d->figures->end[index] - d->figures->start[index]) * d->scale;
    int shade = shade_of(d, rank, op->phase);
    int32_t number = number_of(d, rank, op->phase, op->chunk);
    if (op->kind != EP_OP_PAIR) {
        box(d, x, y, width, BOX, op->kind, shade, number);
        return;
    }
    box(d, x, y, width, BOX / 2.0, EP_OP_FORWARD, shade, number);
    box(d, x, y + BOX / 2.0, width, BOX / 2.0, EP_OP_BACKWARD, shade_of(d, rank, op->back_phase),
        number_of(d, rank, op->back_phase, op->back_chunk));
    fprintf(d->out,
            "<rect x='%.2f' y='%.2f' width='%.2f' height='%d' fill='none' stroke='#333' "
            "stroke-width='.8'/>\n",
            x + .4, y, width - .8, BOX);
}

static void draw_row(const drawing *d, int32_t rank)
{
    const ep_schedule_op *ops;
    size_t count, first;
    double width = d->figures->makespan * d->scale, y = TOP + rank * ROW;
    if (ep_schedule_ops(d->schedule, rank, &ops, &count, &first) != EP_OK)
        return;
    fprintf(d->out, "<text x='%d' y='%.1f' text-anchor='end'>rank %d</text>\n", LEFT - 8,
            y + BOX / 2.0 + 4, (int)rank);
    /* What no box covers is bubble. */
    fprintf(d->out, "<rect x='%d' y='%.1f' width='%.2f' height='%d' fill='url(#bubble)'/>\n", LEFT,
            y, width, BOX);
    for (size_t i = 0; i < count; i++)
        if (computes(&ops[i]))
            draw_op(d, rank, &ops[i], first + i);
    fprintf(d->out,
            "<text x='%.1f' y='%.1f' text-anchor='end'>%.4g</text>\n"
            "<text x='%.1f' y='%.1f' text-anchor='end'>%d</text>\n",
            LEFT + width + 50, y + BOX / 2.0 + 4, d->figures->bubble[rank], LEFT + width + 90,
            y + BOX / 2.0 + 4, (int)d->figures->peak[rank]);
}

static void draw_heads(const drawing *d)
{
    double most = 0, width = d->figures->makespan * d->scale;
    int32_t live = 0;
    for (int32_t rank = 0; rank < d->shape.ranks; rank++) {
        most = fmax(most, d->figures->bubble[rank]);
        live = d->figures->peak[rank] > live ? d->figures->peak[rank] : live;
    }
    fprintf(d->out,
            "<text x='%d' y='26' font-size='17' font-weight='600'>%s, %d ranks, %d "
            "micro-batches</text>\n",
            LEFT, title_of(d->shape.method), (int)d->shape.ranks,
            (int)(d->shape.chunks * d->shape.streams));
    fprintf(
        d->out,
        "<text x='%d' y='47' font-size='12.5' fill='#555'>makespan %.6g, bubble %.4g (%.1f %%), "
        "at most %d live activations</text>\n",
        LEFT, d->figures->makespan, most, 100 * most / d->figures->makespan, (int)live);
    fprintf(d->out,
            "<text x='%.1f' y='%d' text-anchor='end' fill='#555'>bubble</text>\n"
            "<text x='%.1f' y='%d' text-anchor='end' fill='#555'>live</text>\n",
            LEFT + width + 50, TOP - 8, LEFT + width + 90, TOP - 8);
}

static void draw_axis(const drawing *d)
{
    double width = d->figures->makespan * d->scale, y = TOP + d->shape.ranks * ROW + 4;
    /* Ticks at a round step, 60 pixels or more apart. */
    double step = pow(10, floor(log10(60 / d->scale)));
    while (step * d->scale < 60)
        step *= step * d->scale < 30 && step * 5 * d->scale >= 60 ? 5 : 2;
    fprintf(d->out, "<path d='M%d %.1fh%.2f' stroke='#555'/>\n", LEFT, y, width);
    for (double t = 0; t <= d->figures->makespan * (1 + 1e-9); t += step)
        fprintf(d->out,
                "<path d='M%.2f %.1fv5' stroke='#555'/><text x='%.2f' y='%.1f' class='n' "
                "fill='#555'>%.6g</text>\n",
                LEFT + t * d->scale, y, LEFT + t * d->scale, y + 17, t);
    fprintf(d->out, "<text x='%d' y='%.1f' text-anchor='end' fill='#555'>time</text>\n", LEFT - 8,
            y + 17);
}

/* A swatch of both shades and its words; returns the width taken. */
static double legend_entry(const drawing *d, double x, double y, int kind)
{
    int shades = d->shape.phases > 1 ? 2 : 1;
    for (int i = 0; i < shades; i++)
        fprintf(d->out, "<rect x='%.1f' y='%.1f' width='14' height='14' fill='%s'/>\n", x + 14 * i,
                y, looks[kind].fill[i]);
    fprintf(d->out, "<text x='%.1f' y='%.1f'>%s</text>\n", x + 14 * shades + 6, y + 11.5,
            looks[kind].name);
    return 14 * shades + 26 + 6.6 * (double)strlen(looks[kind].name);
}

static unsigned kinds_used(const drawing *d)
{
    unsigned used = 0;
    for (int32_t rank = 0; rank < d->shape.ranks; rank++) {
        const ep_schedule_op *ops;
        size_t count;
        if (ep_schedule_ops(d->schedule, rank, &ops, &count, NULL) != EP_OK)
            continue;
        for (size_t i = 0; i < count; i++)
            used |= 1u << ops[i].kind;
    }
    return used;
}

static void draw_legend(const drawing *d)
{
    double x = LEFT, y = TOP + d->shape.ranks * ROW + 42;
    unsigned used = kinds_used(d);
    for (int kind = EP_OP_FORWARD; kind <= EP_OP_WEIGHT_GRAD; kind++)
        if (used & 1u << kind)
            x += legend_entry(d, x, y, kind);
    if (used & 1u << EP_OP_PAIR) {
        fprintf(d->out,
                "<rect x='%.1f' y='%.1f' width='28' height='7' fill='%s'/>"
                "<rect x='%.1f' y='%.1f' width='28' height='7' fill='%s'/>"
                "<rect x='%.1f' y='%.1f' width='28' height='14' fill='none' stroke='#333'/>"
                "<text x='%.1f' y='%.1f'>overlapped forward and backward</text>\n",
                x, y, looks[EP_OP_FORWARD].fill[0], x, y + 7, looks[EP_OP_BACKWARD].fill[1], x, y,
                x + 34, y + 11.5);
        x += 258;
    }
    fprintf(d->out,
            "<rect x='%.1f' y='%.1f' width='28' height='14' fill='url(#bubble)'/>"
            "<text x='%.1f' y='%.1f'>bubble</text>\n",
            x, y, x + 34, y + 11.5);
    if (d->shape.phases > 1)
        fprintf(d->out, "<text x='%d' y='%.1f' fill='#555'>%s</text>\n", LEFT, y + 32,
                d->shape.streams > 1
                    ? "Light boxes enter at rank 0, dark ones at the last rank."
                    : "Light boxes are the rank's first stage, dark ones its later stages.");
}

void pipeline_svg(FILE *out, const ep_schedule *schedule, const pipeline_figures *figures)
{
    drawing d = {.out = out, .schedule = schedule, .figures = figures};
    if (ep_schedule_get_shape(schedule, &d.shape) != EP_OK)
        return;
    d.scale = LEAST_BOX / shortest_box(&d);
    if (d.scale * figures->makespan > WIDEST)
        d.scale = WIDEST / figures->makespan;
    if (d.scale * figures->makespan < 760)
        d.scale = 760 / figures->makespan; /* room for title and legend */
    double width = LEFT + figures->makespan * d.scale + RIGHT;
    double height = TOP + d.shape.ranks * ROW + BELOW;
    fprintf(out,
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %.0f %.0f' width='%.0f' "
            "height='%.0f' font-family='Helvetica, Arial, sans-serif' font-size='12' "
            "fill='#222'>\n"
            "<style>.n{text-anchor:middle}</style>\n"
            "<defs><pattern id='bubble' width='6' height='6' patternUnits='userSpaceOnUse' "
            "patternTransform='rotate(45)'><rect width='6' height='6' fill='#f1f1f1'/>"
            "<rect width='2' height='6' fill='#dcdcdc'/></pattern></defs>\n"
            "<rect width='100%%' height='100%%' fill='#fff'/>\n",
            width, height, width, height);
    draw_heads(&d);
    for (int32_t rank = 0; rank < d.shape.ranks; rank++)
        draw_row(&d, rank);
    draw_axis(&d);
    draw_legend(&d);
    fputs("</svg>\n", out);
}
