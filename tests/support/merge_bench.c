#include "merge_bench.h"

#include "base/mem.h"
#include "base/par.h"
#include "model/forward.h"
#include "naive_expert.h"
#include "tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

static uint64_t seed;

static double uniform(double low, double high)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return low + (high - low) * (double)(seed >> 40) / 16777216.0;
}

void bench_route(bench *b)
{
    float *score = calloc((size_t)(b->n * b->all), sizeof *score);
    moec_route(score, b->ids, b->gates, b->logits, b->m, b->l, b->n);
    free(score);
}

void bench_run(bench *b)
{
    for (int64_t e = 0; e < b->experts; e++)
        naive_expert(b->out + e * b->hidden, b->experts * b->hidden, b->m, b->l, e, b->x, b->n);
}

/* Tokens and logits at random, routed. */
void bench_open(bench *b, const char *family, int64_t experts, int64_t top_k, int64_t n)
{
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.family = family, .layers = 2, .experts = experts, .top_k = top_k, .seed = 5};
    memset(b, 0, sizeof *b);
    seed = 88172645463325252u;
    b->dir = tiny_folder();
    assert_int_equal(tiny_write(b->dir, &spec, &err), MOEC_OK);
    if (moec_model_open(&b->m, b->dir, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    b->l = &b->m->layer[1];
    assert_non_null(b->l->expert);
    b->n = n;
    b->experts = b->m->dims.experts;
    b->all = b->experts + b->m->dims.null_experts;
    b->hidden = b->m->dims.hidden;
    b->slots = b->m->dims.slots;
    assert_true(b->all <= BENCH_EXPERTS && b->hidden <= BENCH_HIDDEN && b->m->dims.expert_width <= NAIVE_WIDTH);
    b->x = calloc((size_t)(n * b->hidden), sizeof *b->x);
    b->logits = calloc((size_t)(n * b->all), sizeof *b->logits);
    b->ids = calloc((size_t)(n * b->slots), sizeof *b->ids);
    b->gates = calloc((size_t)(n * b->slots), sizeof *b->gates);
    b->out = calloc((size_t)(n * b->experts * b->hidden), sizeof *b->out);
    for (int64_t i = 0; i < n * b->hidden; i++)
        b->x[i] = (float)uniform(-4.0, 4.0);
    for (int64_t i = 0; i < n * b->all; i++)
        b->logits[i] = (float)uniform(-2.0, 2.0);
    bench_route(b);
    bench_run(b);
    b->t = (moec_merge_task){.model = b->m, .layer = b->l, .n = n, .x = b->x, .logits = b->logits, .ld = b->all, .ids = b->ids,
                             .gates = b->gates, .slots = b->slots, .keep = experts / 2, .blocks = 1, .seed = 3};
}

void bench_close(bench *b)
{
    moec_model_close(b->m);
    tiny_remove(b->dir);
    moec_free(b->dir);
    free(b->x);
    free(b->logits);
    free(b->ids);
    free(b->gates);
    free(b->out);
}

void bench_copy(bench_twin *c, bench *b, int64_t of, int64_t to)
{
    const int64_t wide = b->m->dims.expert_width, h = b->hidden;
    const moec_mlp *x = &b->l->expert[of];
    float *old = calloc((size_t)(3 * wide * h), sizeof *old);
    c->bytes = (size_t)(3 * wide * h) * sizeof *c->store;
    c->store = mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(c->store != MAP_FAILED);
    moec_weight_read(old, h, &x->gate, 0, wide, 0, h);
    moec_weight_read(old + wide * h, h, &x->up, 0, wide, 0, h);
    moec_weight_read(old + 2 * wide * h, wide, &x->down, 0, h, 0, wide);
    for (int64_t i = 0; i < wide; i++) {
        const int64_t from = (5 * i + 3) % wide; /* 5 has no factor in common with 12 */
        memcpy(c->store + i * h, old + from * h, (size_t)h * sizeof *old);
        memcpy(c->store + (wide + i) * h, old + (wide + from) * h, (size_t)h * sizeof *old);
        for (int64_t r = 0; r < h; r++)
            c->store[2 * wide * h + r * wide + i] = old[2 * wide * h + r * wide + from];
    }
    free(old);
    c->gate = (moec_tensor){.name = "gate", .dtype = MOEC_F32, .rank = 2, .dim = {wide, h}, .data = c->store,
                            .bytes = (size_t)(wide * h) * 4};
    c->up = c->gate;
    c->up.data = c->store + wide * h;
    c->down = (moec_tensor){.name = "down", .dtype = MOEC_F32, .rank = 2, .dim = {h, wide}, .data = c->store + 2 * wide * h,
                            .bytes = c->gate.bytes};
    b->l->expert[to] = (moec_mlp){moec_weight_of(&c->gate), moec_weight_of(&c->up), moec_weight_of(&c->down)};
    bench_run(b);
}

void bench_copy_free(bench_twin *c)
{
    munmap(c->store, c->bytes);
}

void bench_masses(double *out, const bench *b, moec_merge_mass kind)
{
    double again[BENCH_EXPERTS];
    moec_err err = {MOEC_OK, ""};
    moec_par_set_threads(1);
    if (moec_merge_mass_of(out, &b->t, kind, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_par_set_threads(3);
    assert_int_equal(moec_merge_mass_of(again, &b->t, kind, &err), MOEC_OK);
    moec_par_set_threads(0);
    assert_memory_equal(out, again, (size_t)b->experts * sizeof *out);
}

void bench_distances(double *d, double *kernel, const bench *b, moec_merge_distance kind)
{
    static double again[2][BENCH_EXPERTS * BENCH_EXPERTS];
    moec_err err = {MOEC_OK, ""};
    moec_par_set_threads(1);
    if (moec_merge_distances(d, kernel, &b->t, kind, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_par_set_threads(3);
    assert_int_equal(moec_merge_distances(again[0], again[1], &b->t, kind, &err), MOEC_OK);
    moec_par_set_threads(0);
    assert_memory_equal(d, again[0], (size_t)(b->experts * b->experts) * sizeof *d);
    assert_memory_equal(kernel, again[1], (size_t)(b->experts * b->experts) * sizeof *kernel);
}
