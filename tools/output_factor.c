/* See output_factor.h. */
#include "output_factor.h"

#include <inttypes.h>

static void print_form(const moec_plan *p, const moec_model *m, bool down)
{
    const moec_factor_shape s = moec_factor_shape_of(&p->factor, m, down);
    printf("%-10s [%" PRId64 ", %" PRId64 "]: ", down ? "down" : "gate, up", s.rows, s.cols);
    if (s.kind == MOEC_FACTOR_MPO) {
        printf("cores [");
        for (int64_t k = 0; k < s.cores; k++)
            printf("%s%" PRId64 " x %" PRId64, k > 0 ? ", " : "", s.out[k], s.in[k]);
        printf("], bonds");
        for (int64_t k = 1; k < s.cores; k++)
            printf(" %" PRId64, s.bond[k]);
        printf("\n");
        return;
    }
    printf("rank %" PRId64, s.rank);
    if (s.kind == MOEC_FACTOR_ROWS)
        printf(" and %" PRId64 " whole rows", s.keep);
    printf("%s\n", s.kind == MOEC_FACTOR_BASE ? " beside one base for all experts" : "");
}

void tool_factor_print(const moec_plan *p, const moec_model *m)
{
    char a[32], b[32];
    uint64_t factors, dense;
    moec_factor_sizes(&factors, &dense, p, m);
    if (p->factor.error) {
        printf("%5s %10s %10s %10s\n", "layer", "gate", "up", "down");
        for (int64_t i = 0; i < p->n_layers; i++)
            printf("%5" PRId64 " %10.5f %10.5f %10.5f\n", p->layer[i].layer, p->factor.error[3 * i], p->factor.error[3 * i + 1],
                   p->factor.error[3 * i + 2]);
        printf("squared error of the matrices' outputs on --text, weighted as the router does, relative to the outputs\n\n");
    }
    printf("method     %s\n", p->method);
    print_form(p, m, false);
    print_form(p, m, true);
    printf("experts    %s -> %s as factors (%.1f %%)\n", moec_size_text(a, sizeof a, dense), moec_size_text(b, sizeof b, factors),
           100.0 * (double)factors / (double)dense);
    if (!p->factor.kept)
        printf("           written as dense matrices: NOT smaller, for measuring and for clients that know no factors\n");
    else
        printf("           for transformers 5 with trust_remote_code, which runs modeling_moecompress.py\n");
}

static moec_json *two(int64_t a, int64_t b)
{
    moec_json *o = moec_json_new_array();
    moec_json_push(o, moec_json_new_int(a));
    moec_json_push(o, moec_json_new_int(b));
    return o;
}

static moec_json *bonds(const moec_plan_factor *f, int down)
{
    moec_json *o = moec_json_new_array();
    for (int64_t k = 0; k + 1 < f->cores; k++)
        moec_json_push(o, moec_json_new_int(f->bond[down][k]));
    return o;
}

moec_json *tool_factor_json(const moec_plan *p, const moec_model *m)
{
    const moec_plan_factor *f = &p->factor;
    moec_json *o = moec_json_new_object(), *bytes = moec_json_new_object();
    uint64_t factors, dense;
    moec_factor_sizes(&factors, &dense, p, m);
    moec_json_set(o, "emit", moec_json_new_string(f->kept ? "factored" : "dense"));
    if (f->kind != MOEC_FACTOR_MPO)
        moec_json_set(o, "rank", two(f->rank[0], f->rank[1]));
    if (f->kind == MOEC_FACTOR_ROWS)
        moec_json_set(o, "rows", two(f->rows[0], f->rows[1]));
    if (f->kind == MOEC_FACTOR_MPO) {
        moec_json *list = moec_json_new_array();
        moec_json_push(list, bonds(f, 0));
        moec_json_push(list, bonds(f, 1));
        moec_json_set(o, "bonds", list);
    }
    moec_json_set(bytes, "source", moec_json_new_int((int64_t)dense));
    moec_json_set(bytes, "factors", moec_json_new_int((int64_t)factors));
    moec_json_set(bytes, "output", moec_json_new_int((int64_t)(f->kept ? factors : dense)));
    moec_json_set(o, "expert_bytes", bytes);
    if (f->error) {
        moec_json *list = moec_json_new_array();
        for (int64_t i = 0; i < p->n_layers; i++)
            moec_json_push(list, moec_json_new_reals(f->error + 3 * i, 3));
        moec_json_set(o, "error", list);
    }
    return o;
}
