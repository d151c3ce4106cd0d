/* SPDX-License-Identifier: MIT */
/*
 * Load per GPU before and after a plan, as SVG: two maps with a row per layer
 * and a column per GPU, and beside them each layer's slowest GPU, which is what
 * the others wait for. Loads are in multiples of the layer's mean, averaged over
 * windows.
 */
#include "plan_eplb.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LEFT = 58,     /* for the layers' numbers */
    TOP = 74,      /* for title and heads */
    MAP = 300,     /* width of a map */
    GAP = 26,      /* between maps */
    PLOT = 210,    /* width of the third panel */
    PLOT_GAP = 44, /* before it */
    RIGHT = 22,
    BELOW = 84,      /* for the axes and the legend */
    LEAST_MAP = 120, /* height of the maps */
    MOST_MAP = 360
};

#define INK "#24292f"
#define FAINT "#6e7781"
#define BEFORE "#d1495b"
#define AFTER "#1b6f8a"
#define TOP_LOAD 3.0 /* where the colours end */

typedef struct drawing {
    FILE *out;
    const eplb_figures *figures;
    int layers, gpus;
    double *before, *after;           /* [layers][gpus] in means */
    double *before_peak, *after_peak; /* [layers] */
    double row;                       /* height of a layer */
    double worst;                     /* end of the third panel's axis */
} drawing;

/* Adds one window's loads in multiples of their mean; the peak too. */
static void add_relative(const double *load, int gpus, double *relative, double *peak)
{
    double sum = 0, most = 0;
    for (int g = 0; g < gpus; g++) {
        sum += load[g];
        most = fmax(most, load[g]);
    }
    double unit = sum > 0 ? gpus / sum : 0;
    for (int g = 0; g < gpus; g++)
        relative[g] += load[g] * unit;
    *peak += sum > 0 ? most * unit : 1;
}

static void average(drawing *d, const double *load, double *relative, double *peak)
{
    int windows = d->figures->config->windows;
    size_t cells = (size_t)d->layers * (size_t)d->gpus;
    for (int w = 0; w < windows; w++)
        for (int l = 0; l < d->layers; l++, load += d->gpus)
            add_relative(load, d->gpus, relative + (size_t)l * (size_t)d->gpus, &peak[l]);
    for (size_t i = 0; i < cells; i++)
        relative[i] /= windows;
    for (int l = 0; l < d->layers; l++)
        peak[l] /= windows;
}

/* From pale blue (idle) over grey (the mean) to dark red (three times the mean and more). */
static void colour(double load, char text[8])
{
    static const struct {
        double at;
        int rgb[3];
    } stops[] = {{0, {0x9c, 0xc4, 0xe4}},
                 {1, {0xee, 0xf0, 0xf2}},
                 {1.5, {0xf9, 0xc8, 0x80}},
                 {2, {0xee, 0x87, 0x4a}},
                 {TOP_LOAD, {0xa6, 0x1b, 0x3a}}};
    int k = 0, rgb[3];
    load = fmin(load, TOP_LOAD);
    while (k < 3 && load > stops[k + 1].at)
        k++;
    double part = (load - stops[k].at) / (stops[k + 1].at - stops[k].at);
    for (int i = 0; i < 3; i++)
        rgb[i] = (int)lround(stops[k].rgb[i] + part * (stops[k + 1].rgb[i] - stops[k].rgb[i]));
    snprintf(text, 8, "#%02x%02x%02x", (unsigned)rgb[0] & 255, (unsigned)rgb[1] & 255,
             (unsigned)rgb[2] & 255);
}

static void label(const drawing *d, double x, double y, const char *anchor, const char *style,
                  const char *text)
{
    fprintf(d->out, "<text x='%.1f' y='%.1f' text-anchor='%s' class='%s'>%s</text>\n", x, y, anchor,
            style, text);
}

/* A row of a map; neighbours of one colour share a box, which keeps even maps small. */
static void draw_cells(const drawing *d, double x, double y, const double *load)
{
    double width = (double)MAP / d->gpus;
    int labelled = width >= 30 && d->row >= 18;
    for (int g = 0, next; g < d->gpus; g = next) {
        char fill[8], other[8];
        colour(load[g], fill);
        for (next = g + 1; next < d->gpus && !labelled; next++) {
            colour(load[next], other);
            if (strcmp(fill, other) != 0)
                break;
        }
        fprintf(d->out, "<rect x='%.2f' y='%.2f' width='%.2f' height='%.2f' fill='%s'/>\n",
                x + g * width, y, (next - g) * width, d->row, fill);
        if (labelled)
            fprintf(d->out, "<text x='%.1f' y='%.1f' text-anchor='middle' class='s'>%.2f</text>\n",
                    x + (g + .5) * width, y + d->row / 2 + 4, load[g]);
    }
}

static void draw_map(const drawing *d, double x, const char *title, const char *what,
                     double balancedness, const double *load)
{
    char text[160];
    double bottom = TOP + d->row * d->layers;
    snprintf(text, sizeof text, "%s: %s", title, what);
    label(d, x, TOP - 26, "start", "h", text);
    snprintf(text, sizeof text, "balancedness %.4f", balancedness);
    label(d, x, TOP - 9, "start", "s", text);
    fprintf(d->out, "<g shape-rendering='crispEdges'>\n"); /* no seams between boxes */
    for (int l = 0; l < d->layers; l++)
        draw_cells(d, x, TOP + l * d->row, load + (size_t)l * (size_t)d->gpus);
    fprintf(d->out, "</g>\n");
    label(d, x, bottom + 15, "start", "s", "GPU 0");
    snprintf(text, sizeof text, "%d", d->gpus - 1);
    label(d, x + MAP, bottom + 15, "end", "s", text);
}

static void draw_layer_numbers(const drawing *d)
{
    int step = d->layers <= 12 ? 1 : d->layers <= 30 ? 5 : 10;
    for (int l = 0; l < d->layers; l++) {
        int number = l + d->figures->first_layer;
        char text[16];
        if (number % step && l > 0)
            continue;
        if (l == 0 && step > 1 && (step - number % step) * d->row < 12 && number % step)
            continue; /* would run into the next one */
        snprintf(text, sizeof text, "%d", number);
        label(d, LEFT - 7, TOP + (l + .5) * d->row + 4, "end", "s", text);
    }
    fprintf(d->out,
            "<text transform='translate(16 %.1f) rotate(-90)' text-anchor='middle' "
            "class='s'>layer</text>\n",
            TOP + d->row * d->layers / 2);
}

/* --- the slowest GPU --- */

static double plot_x(const drawing *d, double load)
{
    double left = LEFT + 2 * MAP + GAP + PLOT_GAP;
    return left + (load - 1) / (d->worst - 1) * PLOT;
}

static void draw_axis(const drawing *d)
{
    double bottom = TOP + d->row * d->layers;
    double step = d->worst > 9 ? 2 : d->worst > 3 ? 1 : .5;
    for (double at = 1; at <= d->worst + 1e-9; at += step) {
        char text[32];
        double x = plot_x(d, at);
        fprintf(d->out, "<line x1='%.1f' y1='%d' x2='%.1f' y2='%.1f' stroke='#d8dee4'/>\n", x, TOP,
                x, bottom);
        snprintf(text, sizeof text, at > 1 ? "%g&#215;" : "mean", at);
        label(d, x, bottom + 15, "middle", "s", text);
    }
}

static void draw_peaks(const drawing *d)
{
    double size = fmin(3.6, fmax(1.8, d->row * .42));
    label(d, plot_x(d, 1), TOP - 26, "start", "h", "Slowest GPU");
    fprintf(d->out,
            "<text x='%.1f' y='%d' class='s'><tspan fill='" BEFORE "'>&#9679; before</tspan>"
            "<tspan dx='10' fill='" AFTER "'>&#9679; after</tspan></text>\n",
            plot_x(d, 1), TOP - 9);
    draw_axis(d);
    for (int l = 0; l < d->layers; l++) {
        double y = TOP + (l + .5) * d->row;
        double from = plot_x(d, d->after_peak[l]), to = plot_x(d, d->before_peak[l]);
        fprintf(d->out,
                "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='#c9d1d9' "
                "stroke-width='%.1f'/>\n"
                "<circle cx='%.1f' cy='%.1f' r='%.1f' fill='" BEFORE "'/>\n"
                "<circle cx='%.1f' cy='%.1f' r='%.1f' fill='" AFTER "'/>\n",
                from, y, to, y, fmin(1.2, d->row * .3), to, y, size, from, y, size);
    }
}

/* --- the frame --- */

static void draw_legend(const drawing *d)
{
    double y = TOP + d->row * d->layers + 38, width = 2 * MAP + GAP - 330, x = LEFT + 165;
    enum { STEPS = 60 };
    label(d, x - 10, y + 11, "end", "s", "load of a GPU: idle");
    fprintf(d->out, "<g shape-rendering='crispEdges'>\n");
    for (int i = 0; i < STEPS; i++) {
        char fill[8];
        colour(TOP_LOAD * (i + .5) / STEPS, fill);
        fprintf(d->out, "<rect x='%.2f' y='%.1f' width='%.2f' height='14' fill='%s'/>\n",
                x + width * i / STEPS, y, width / STEPS, fill);
    }
    fprintf(d->out, "</g>\n");
    for (int i = 1; i < 3; i++) {
        char text[16];
        snprintf(text, sizeof text, i > 1 ? "%d&#215;" : "mean", i);
        label(d, x + width * i / TOP_LOAD, y + 28, "middle", "s", text);
    }
    label(d, x + width + 10, y + 11, "start", "s", "3&#215; the mean and more");
}

static void draw_frame(const drawing *d)
{
    const ep_plan_config *c = d->figures->config;
    int width = LEFT + 2 * MAP + GAP + PLOT_GAP + PLOT + RIGHT;
    double height = TOP + d->row * d->layers + BELOW;
    fprintf(d->out,
            "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%.0f' viewBox='0 0 %d "
            "%.0f'>\n<style>text{font-family:Helvetica,Arial,sans-serif;fill:" INK
            "}.t{font-size:15px;font-weight:bold}.h{font-size:13px;font-weight:bold}"
            ".s{font-size:11.5px}</style>\n<rect width='%d' height='%.0f' fill='#fff'/>\n",
            width, height, width, height, width, height);
    char twice[64] = "no GPU holds an expert twice";
    if (d->figures->report->duplicates)
        snprintf(twice, sizeof twice, "slots that repeat an expert on a GPU: %lld",
                 (long long)d->figures->report->duplicates);
    fprintf(d->out,
            "<text x='%d' y='24' class='t'>%d experts in %d slots on %d GPUs"
            "<tspan dx='10' style='font-weight:normal;font-size:12.5px' fill='" FAINT
            "'>%d layer%s, a row each; %s%s</tspan></text>\n",
            LEFT, c->experts, c->replicas, c->gpus, d->layers, d->layers == 1 ? "" : "s",
            c->windows > 1 ? "mean of the load windows; " : "", twice);
}

static void draw(const drawing *d)
{
    const eplb_figures *f = d->figures;
    draw_frame(d);
    draw_layer_numbers(d);
    draw_map(d, LEFT, "Before", f->before_title, f->report->balancedness_before, d->before);
    draw_map(d, LEFT + MAP + GAP, "After", ep_plan_policy_name(f->config->policy),
             f->report->balancedness, d->after);
    draw_peaks(d);
    draw_legend(d);
    fprintf(d->out, "</svg>\n");
}

static void measure(drawing *d)
{
    average(d, d->figures->before, d->before, d->before_peak);
    average(d, d->figures->after, d->after, d->after_peak);
    d->row = fmin(46, fmin((double)MOST_MAP, fmax((double)LEAST_MAP, 6.0 * d->layers)) / d->layers);
    d->worst = 1.5;
    for (int l = 0; l < d->layers; l++)
        d->worst = fmax(d->worst, fmax(d->before_peak[l], d->after_peak[l]));
    d->worst = ceil(d->worst * 2) / 2;
}

int eplb_svg(FILE *out, const eplb_figures *figures)
{
    drawing d = {.out = out,
                 .figures = figures,
                 .layers = figures->config->layers,
                 .gpus = figures->config->gpus};
    size_t layers = (size_t)d.layers, cells = layers * (size_t)d.gpus;
    double *block = calloc(2 * cells + 2 * layers, sizeof *block);
    if (!block)
        return 0;
    d.before = block;
    d.after = block + cells;
    d.before_peak = d.after + cells;
    d.after_peak = d.before_peak + layers;
    measure(&d);
    draw(&d);
    free(block);
    return 1;
}
