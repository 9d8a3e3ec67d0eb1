/* See output_quant.h. */
#include "output_quant.h"

#include <inttypes.h>
#include <string.h>

enum { WIDTHS = 17 };

typedef struct tally {
    int64_t count[WIDTHS]; /* matrices of each width; 16: as they are */
    double mean;
} tally;

static tally count_layer(const moec_plan *p, const moec_model *m, int64_t l)
{
    const int64_t n = 3 * m->dims.experts;
    tally t = {.mean = 0.0};
    for (int64_t i = 0; i < n; i++) {
        const int bits = p->quant.expert[l * n + i];
        t.count[bits < WIDTHS ? bits : WIDTHS - 1]++;
        t.mean += (double)bits / (double)n;
    }
    return t;
}

/* Matrices of attention, shared experts and dense layers by their width; nothing where all are as they are. */
static tally count_others(const moec_plan *p)
{
    tally t = {.mean = 0.0};
    for (int64_t i = 0; p->quant.mat && i < p->quant.n_mat_layers * MOEC_MAT_COUNT; i++)
        if (p->quant.mat[i] > 0 && p->quant.mat[i] < WIDTHS - 1)
            t.count[p->quant.mat[i]]++;
    return t;
}

static void print_others(const moec_plan *p)
{
    const tally t = count_others(p);
    const char *between = "others     ";
    for (int b = 0; b < WIDTHS; b++)
        if (t.count[b] > 0) {
            printf("%s%" PRId64 " matrices of %d bits", between, t.count[b], b);
            between = ", ";
        }
    if (between[0] == ',')
        printf(" (attention, shared experts, dense layers)\n");
}

void tool_quant_print(const moec_plan *p, const moec_model *m, const moec_quantize_report *report)
{
    double bits, disk;
    bool used[WIDTHS] = {false};
    for (int64_t i = 0; i < 3 * m->moe_layers * m->dims.experts; i++)
        used[p->quant.expert[i] < WIDTHS ? p->quant.expert[i] : WIDTHS - 1] = true;
    printf("%5s %6s ", "layer", "bits");
    for (int b = 0; b < WIDTHS; b++)
        if (used[b])
            printf(" %5d-bit", b);
    printf(p->quant.error ? " %10s %10s %10s\n" : "\n", "gate", "up", "down");
    for (int64_t l = 0; l < p->n_layers; l++) {
        const tally t = count_layer(p, m, l);
        printf("%5" PRId64 " %6.3f ", p->layer[l].layer, t.mean);
        for (int b = 0; b < WIDTHS; b++)
            if (used[b])
                printf(" %9" PRId64, t.count[b]);
        if (p->quant.error)
            printf(" %10.5f %10.5f %10.5f", p->quant.error[3 * l], p->quant.error[3 * l + 1], p->quant.error[3 * l + 2]);
        printf("\n");
    }
    printf("matrices of routed experts by their width%s\n\n",
           p->quant.error ? "; squared error of their outputs on --text, relative to the outputs, every expert counting alike" : "");
    moec_quantize_means(&bits, &disk, p, m);
    const moec_qformat *f = moec_qformat_find(p->quant.format);
    printf("method     %s\nformat     %s", p->method, p->quant.format);
    if (f) {
        const int64_t in = moec_qformat_grid(f, &p->quant, m->dims.hidden, 4).group;
        const int64_t down = moec_qformat_grid(f, &p->quant, m->dims.expert_width, 4).group;
        printf(in == down ? ", groups of %" PRId64 : ", groups of %" PRId64 ", of %" PRId64 " in down", in, down);
    }
    printf("\nbits       %.3f a weight of the routed experts, %.3f on disk%s\n", bits, disk, f && f->dense ? ", dequantized" : " with scales");
    print_others(p);
    if (report && report->by_gptq + report->by_nearest > 0)
        printf("rounding   %" PRId64 " matrices by gptq, %" PRId64 " where rounding to nearest was better\n", report->by_gptq,
               report->by_nearest);
    if (f)
        printf("loads in   %s\n", f->loads);
}

static moec_json *report_json(const moec_quantize_report *r)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "matrices", moec_json_new_int(r->matrices));
    moec_json_set(o, "by_gptq", moec_json_new_int(r->by_gptq));
    moec_json_set(o, "by_nearest", moec_json_new_int(r->by_nearest));
    moec_json_set(o, "unseen_experts", moec_json_new_int(r->unseen));
    moec_json_set(o, "experts_below_columns", moec_json_new_int(r->few));
    return o;
}

moec_json *tool_quant_json(const moec_plan *p, const moec_model *m, const moec_quantize_report *report)
{
    double bits, disk;
    moec_json *o = moec_json_new_object(), *layers = moec_json_new_array();
    moec_quantize_means(&bits, &disk, p, m);
    moec_json_set(o, "format", moec_json_new_string(p->quant.format));
    moec_json_set(o, "group_size", moec_json_new_int(p->quant.group));
    moec_json_set(o, "bits", moec_json_new_real(bits));
    moec_json_set(o, "bits_on_disk", moec_json_new_real(disk));
    for (int64_t l = 0; l < p->n_layers; l++) {
        const tally t = count_layer(p, m, l);
        moec_json *one = moec_json_new_object(), *widths = moec_json_new_object();
        for (int b = 0; b < WIDTHS; b++) {
            char name[16];
            snprintf(name, sizeof name, "%d", b);
            if (t.count[b] > 0)
                moec_json_set(widths, name, moec_json_new_int(t.count[b]));
        }
        moec_json_set(one, "layer", moec_json_new_int(p->layer[l].layer));
        moec_json_set(one, "bits", moec_json_new_real(t.mean));
        moec_json_set(one, "widths", widths);
        if (p->quant.error)
            moec_json_set(one, "error", moec_json_new_reals(p->quant.error + 3 * l, 3));
        moec_json_push(layers, one);
    }
    moec_json_set(o, "layers", layers);
    if (report)
        moec_json_set(o, "report", report_json(report));
    return o;
}

moec_status tool_quant_record(const moec_quantizing *q, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_json *list = moec_quantizing_modules(q);
    char *text = NULL, *line = NULL;
    size_t n = 0, cap = 0;
    for (size_t i = 0; i < moec_json_len(list); i++) {
        MOEC_TRY(moec_json_dump(&line, moec_json_at(list, i), 0, err));
        const size_t len = strlen(line);
        MOEC_TRY(MOEC_GROW(text, cap, n + len + 2, err));
        memcpy(text + n, line, len);
        n += len;
        if (n == 0 || text[n - 1] != '\n')
            text[n++] = '\n';
        moec_free(line);
        line = NULL;
    }
    MOEC_TRY(moec_file_write(path, text ? text : "", n, err));
done:
    moec_free(line);
    moec_free(text);
    return st;
}
