/* Merged experts: copies of the centre in any order, scale and sign give the centre again; what alignment, dead members, guarded
 * experts, alpha and repeated neurons must do; layouts, biases, threads and types. Numbers against numpy are in
 * tests/interop/test_merge_fill.py. */
#include "base/hash.h"
#include "base/mem.h"
#include "base/par.h"
#include "method/merge_parts.h"
#include "num/linalg.h"
#include "repair_layer.h"

#include <math.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { PART = HIDDEN * WIDTH };

/* The source's layer and the target, which begins as a copy of it. */
typedef struct merging {
    fixture from, into;
    int32_t centre[EXPERTS], row[EXPERTS];
    double weight[EXPERTS], saliency[EXPERTS];
    bool guarded[EXPERTS];
    moec_merge_task t;
    moec_merge_groups g;
    moec_merge_target to;
    moec_merge_recipe r;
    moec_merge_tally tally;
    moec_err err;
} merging;

static void setup(merging *m, rules r)
{
    const uint64_t seed = repair_seed;
    memset(m, 0, sizeof *m);
    r.keep = EXPERTS;
    repair_setup(&m->from, r);
    repair_seed = seed;
    repair_setup(&m->into, r);
    for (int32_t e = 0; e < EXPERTS; e++) {
        m->centre[e] = m->row[e] = e;
        m->weight[e] = m->saliency[e] = 1;
    }
    fixture *f = &m->from;
    f->layer.mat[MOEC_MAT_ROUTER] = repair_view(&f->router, 0, EXPERTS, HIDDEN, HIDDEN, 1);
    m->g = (moec_merge_groups){.centre = m->centre, .weight = m->weight, .saliency = m->saliency};
    m->t = (moec_merge_task){.model = &f->model, .layer = &f->layer, .n = f->r.n, .x = f->x, .ids = f->ids, .gates = f->gates,
                             .slots = f->r.slots, .keep = EXPERTS, .blocks = 1, .guarded = m->guarded};
    m->to = (moec_merge_target){.expert = m->into.expert, .router = repair_view(&m->into.router, 0, EXPERTS, HIDDEN, HIDDEN, 1),
                                .row = m->row, .gate_up_bias = m->into.layer.gate_up_bias,
                                .down_bias = m->into.layer.down_bias};
    m->to.gate_up_bias = r.biased ? &m->into.gate_up_bias : NULL;
    m->to.down_bias = r.biased ? &m->into.down_bias : NULL;
    if (r.biased)
        for (int k = 0; k < 2; k++) { /* [E, .], as in a checkpoint */
            fixture *x = k ? &m->into : &m->from;
            x->gate_up_bias.rank = x->down_bias.rank = 2;
            x->gate_up_bias.dim[0] = x->down_bias.dim[0] = EXPERTS;
            x->gate_up_bias.dim[1] = 2 * WIDTH;
            x->down_bias.dim[1] = HIDDEN;
        }
    m->r = (moec_merge_recipe){.rank = 1, .segment = {.alpha = 0.4, .up = 0.5, .down = 0.5, .rounds = 20, .same_norm = true}};
}

static void teardown(merging *m)
{
    repair_teardown(&m->from);
    repair_teardown(&m->into);
}

static moec_status run(merging *m)
{
    m->err = (moec_err){MOEC_OK, ""};
    return moec_merge_fill_all(&m->tally, &m->to, &m->t, &m->g, &m->r, &m->err);
}

static void fill(merging *m)
{
    if (run(m) != MOEC_OK)
        fail_msg("%s", m->err.text);
}

static bool unchanged(const merging *m, int32_t e)
{
    double a[EXPERT_VALUES], b[EXPERT_VALUES];
    repair_weights(a, &m->from, e);
    repair_weights(b, &m->into, e);
    return memcmp(a, b, sizeof a) == 0;
}

/* Writes gate, up, down [EXPERT_VALUES] into expert e of the source. */
static void put_weights(const fixture *f, int32_t e, const double *w)
{
    float v[EXPERT_VALUES];
    for (int i = 0; i < EXPERT_VALUES; i++)
        v[i] = (float)w[i];
    assert_int_equal(moec_weight_write(&f->expert[e].gate, v, HIDDEN, 0, WIDTH, 0, HIDDEN, NULL), MOEC_OK);
    assert_int_equal(moec_weight_write(&f->expert[e].up, v + PART, HIDDEN, 0, WIDTH, 0, HIDDEN, NULL), MOEC_OK);
    assert_int_equal(moec_weight_write(&f->expert[e].down, v + 2 * PART, WIDTH, 0, HIDDEN, 0, WIDTH, NULL), MOEC_OK);
}

static moec_weight bias_of(const fixture *f, int32_t e)
{
    return (moec_weight){.of = &f->gate_up_bias, .rows = WIDTH, .cols = 2, .at = e * 2 * WIDTH, .row_step = f->r.pairs ? 2 : 1,
                         .col_step = f->r.pairs ? 1 : WIDTH};
}

/* Expert `to` of the source becomes expert `from` with its neurons in another order, and up and down rescaled. */
static void plant_copy(const merging *m, int32_t to, int32_t from, bool scaled)
{
    const fixture *f = &m->from;
    double a[EXPERT_VALUES], b[EXPERT_VALUES];
    float bias[2 * WIDTH], turned[2 * WIDTH];
    repair_weights(a, f, from);
    for (int j = 0; j < WIDTH; j++) {
        const int k = (7 * j + 3 * to) % WIDTH;
        const double s = scaled ? (j % 3 ? 1 : -1) * (0.25 + (double)j / 4) : 1;
        memcpy(b + j * HIDDEN, a + k * HIDDEN, HIDDEN * sizeof *a);
        for (int h = 0; h < HIDDEN; h++) {
            b[PART + j * HIDDEN + h] = a[PART + k * HIDDEN + h] * s;
            b[2 * PART + h * WIDTH + j] = a[2 * PART + h * WIDTH + k] / s;
        }
    }
    put_weights(f, to, b);
    if (!f->r.biased)
        return;
    const moec_weight in = bias_of(f, from), out = bias_of(f, to);
    moec_weight_read(bias, 2, &in, 0, WIDTH, 0, 2);
    for (int j = 0; j < WIDTH; j++)
        memcpy(turned + 2 * j, bias + 2 * ((7 * j + 3 * to) % WIDTH), 2 * sizeof *bias);
    assert_int_equal(moec_weight_write(&out, turned, 2, 0, WIDTH, 0, 2, NULL), MOEC_OK);
    float down[HIDDEN];
    const moec_weight all = moec_weight_of(&f->down_bias);
    moec_weight_read(down, HIDDEN, &all, from, 1, 0, HIDDEN);
    assert_int_equal(moec_weight_write(&all, down, HIDDEN, to, 1, 0, HIDDEN, NULL), MOEC_OK);
}

/* Largest difference of the outputs of expert e of a and k of b, relative to the largest output. */
static double apart(const fixture *a, int32_t e, const fixture *b, int32_t k)
{
    double w[EXPERT_VALUES], v[EXPERT_VALUES], off = 0, most = 0;
    repair_weights(w, a, e);
    repair_weights(v, b, k);
    for (int64_t t = 0; t < 50; t++) {
        double y[HIDDEN] = {0}, z[HIDDEN] = {0};
        repair_add(y, a, w, e, a->x + t * HIDDEN, 1);
        repair_add(z, b, v, k, a->x + t * HIDDEN, 1);
        for (int h = 0; h < HIDDEN; h++) {
            off = fmax(off, fabs(y[h] - z[h]));
            most = fmax(most, fabs(y[h]));
        }
    }
    return off / most;
}

static void group(merging *m, int32_t centre, int32_t a, int32_t b)
{
    m->centre[a] = m->centre[b] = centre;
    m->weight[centre] = 0.5;
    m->weight[a] = 0.2;
    m->weight[b] = 0.3;
}

static void copies_give_the_centre(void **state)
{
    static const moec_merge_align ways[] = {MOEC_ALIGN_PLAIN, MOEC_ALIGN_CANONICAL, MOEC_ALIGN_ACTIVATIONS};
    (void)state;
    for (int kind = 0; kind < 4; kind++)
        for (size_t i = 0; i < MOEC_COUNT(ways); i++)
            for (int fills = 0; fills < 2; fills++) {
                merging m;
                setup(&m, (rules){.pairs = kind & 1, .clamped = kind & 2, .biased = kind & 2});
                const bool scaled = !(kind & 2) && ways[i] != MOEC_ALIGN_PLAIN;
                plant_copy(&m, 1, 4, scaled);
                plant_copy(&m, 3, 4, scaled);
                group(&m, 4, 1, 3);
                m.r.align = ways[i];
                m.r.fill = fills ? MOEC_FILL_SUBSPACE : MOEC_FILL_AVERAGE;
                double before[EXPERTS][EXPERT_VALUES], after[EXPERT_VALUES];
                for (int32_t e = 0; e < EXPERTS; e++)
                    repair_weights(before[e], &m.into, e);
                fill(&m);
                assert_true(apart(&m.from, 4, &m.into, 4) < 1e-6);
                assert_int_equal(m.tally.merged, 2);
                assert_int_equal(m.tally.aligned, 2);
                assert_true(m.tally.gain > 0);
                for (int32_t e = 0; e < EXPERTS; e++) {
                    repair_weights(after, &m.into, e);
                    assert_true((e == 4) == (memcmp(after, before[e], sizeof after) != 0));
                }
                teardown(&m);
            }
}

static void equal_members_change_nothing(void **state)
{
    (void)state;
    for (int align = 0; align < MOEC_ALIGN_COUNT; align++) {
        merging m;
        double w[EXPERT_VALUES], v[EXPERT_VALUES];
        setup(&m, (rules){.renorm = true});
        repair_weights(w, &m.from, 2);
        put_weights(&m.from, 0, w);
        put_weights(&m.from, 5, w);
        group(&m, 2, 0, 5);
        m.r.align = (moec_merge_align)align;
        fill(&m);
        assert_int_equal(m.tally.aligned, 0);
        repair_weights(v, &m.into, 2);
        for (int i = 0; i < EXPERT_VALUES; i++)
            assert_true(fabs(v[i] - w[i]) <= 3e-7 * fabs(w[i]));
        teardown(&m);
    }
}

/* All ranks are the average, bit for bit; with fewer the projection is one, and is in the average's place. */
static void subspaces_project(void **state)
{
    (void)state;
    for (int whiten = 0; whiten < 2; whiten++) {
        merging a, b;
        double wa[EXPERT_VALUES], wb[EXPERT_VALUES], inner = 0, length = 0;
        repair_seed = 1234567 + (uint64_t)whiten;
        setup(&a, (rules){.slots = 3});
        repair_seed = 1234567 + (uint64_t)whiten;
        setup(&b, (rules){.slots = 3});
        group(&a, 1, 2, 3);
        group(&b, 1, 2, 3);
        b.r.fill = MOEC_FILL_SUBSPACE;
        b.r.whiten = whiten;
        fill(&a);
        fill(&b);
        repair_weights(wa, &a.into, 1);
        repair_weights(wb, &b.into, 1);
        assert_memory_equal(wa, wb, sizeof wa);
        b.r.rank = 0.4;
        fill(&b);
        repair_weights(wb, &b.into, 1);
        for (int i = 0; i < EXPERT_VALUES; i++) { /* <P w, w - P w> = 0 */
            inner += wb[i] * (wa[i] - wb[i]);
            length += wb[i] * wb[i];
        }
        assert_true(length > 0.01 && fabs(inner) < 1e-5 * length);
        teardown(&a);
        teardown(&b);
    }
}

/* A member of weight 0 is as good as none. */
static void dead_members_do_not_count(void **state)
{
    (void)state;
    merging m;
    setup(&m, (rules){.renorm = true});
    group(&m, 2, 0, 5);
    m.weight[2] = 1;
    m.weight[0] = m.weight[5] = 0;
    m.r.router = MOEC_ROW_WEIGHTED;
    fill(&m);
    for (int32_t e = 0; e < EXPERTS; e++)
        assert_true(unchanged(&m, e));
    assert_int_equal(m.tally.merged, 2);
    teardown(&m);
}

static void guarded_experts_stay(void **state)
{
    (void)state;
    for (int segments = 0; segments < 2; segments++) {
        merging m;
        setup(&m, (rules){.renorm = true});
        if (segments) {
            m.r.fill = MOEC_FILL_SEGMENTS;
            m.r.segment.alpha = -1;
            m.centre[0] = m.centre[5] = -1;
        } else {
            group(&m, 2, 0, 5);
        }
        m.r.router = MOEC_ROW_ADD;
        m.guarded[2] = true;
        fill(&m);
        assert_true(unchanged(&m, 2));
        assert_memory_equal((const char *)m.from.router.data + 2 * HIDDEN * 4, (const char *)m.into.router.data + 2 * HIDDEN * 4,
                            HIDDEN * 4);
        teardown(&m);
    }
}

/* --- segments ---------------------------------------------------------------------------------------------------------- */

static void setup_segments(merging *m, rules r, double alpha)
{
    setup(m, r);
    m->r.fill = MOEC_FILL_SEGMENTS;
    m->r.segment.alpha = alpha;
    m->r.router = MOEC_ROW_ADD;
}

static void alpha_decides_who_moves(void **state)
{
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        merging m;
        setup_segments(&m, (rules){.renorm = true}, 1);
        m.r.segment.response = kind & 1;
        m.r.segment.canonical = kind & 2;
        fill(&m); /* all stay: nothing is there to move */
        assert_true(m.tally.moved == 0 && m.tally.dropped == 0 && m.tally.merged == 0);
        double w[EXPERT_VALUES];
        repair_weights(w, &m.from, 1);
        put_weights(&m.from, 4, w); /* as like as can be */
        m.centre[4] = m.centre[5] = -1;
        fill(&m);
        assert_true(m.tally.moved == 0 && m.tally.dropped == 2 * WIDTH && m.tally.merged == 0);
        for (int32_t e = 0; e < 4; e++)
            assert_true(unchanged(&m, e));
        assert_memory_equal(m.from.router.data, m.into.router.data, m.from.router.bytes);
        m.r.segment.alpha = -1;
        m.saliency[5] = 0; /* dead: not even then */
        fill(&m);
        assert_true(m.tally.moved == WIDTH && m.tally.dropped == WIDTH && m.tally.merged == 1);
        assert_true(unchanged(&m, 0) && unchanged(&m, 2) && unchanged(&m, 3));
        if (!(kind & 1))
            assert_true(apart(&m.from, 1, &m.into, 1) < 1e-6);
        for (int h = 0; h < HIDDEN; h++) { /* all of expert 4 went to 1 */
            const float *from = m.from.router.data, *into = m.into.router.data;
            assert_true(fabsf(into[HIDDEN + h] - (from[HIDDEN + h] + from[4 * HIDDEN + h])) < 1e-6f);
            assert_true(into[h] == from[h]);
        }
        teardown(&m);
    }
}

/* Neuron j of w becomes neuron k with its up times `up`, adding `share` of what k adds. */
static void repeat_neuron(double *w, int j, int k, double up, double share)
{
    memcpy(w + j * HIDDEN, w + k * HIDDEN, HIDDEN * sizeof *w);
    for (int h = 0; h < HIDDEN; h++) {
        w[PART + j * HIDDEN + h] = up * w[PART + k * HIDDEN + h];
        w[2 * PART + h * WIDTH + j] = w[2 * PART + h * WIDTH + k] * share / up;
    }
}

/* The dropped expert is the kept one with a neuron written in two parts: their sum is that neuron, their mean is not. Parts of
 * other scale and sign are one neuron where scale is taken out. */
static void same_source_adds_up(void **state)
{
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        const bool canonical = kind & 1, same_norm = kind & 2;
        merging m;
        double w[EXPERT_VALUES];
        setup_segments(&m, (rules){.renorm = true}, -1);
        repair_weights(w, &m.from, 0);
        for (int h = 0; h < HIDDEN; h++) /* neuron 7 is silent, so that its place is free */
            w[2 * PART + h * WIDTH + 7] = w[PART + 7 * HIDDEN + h] = w[7 * HIDDEN + h] = 0;
        put_weights(&m.from, 0, w);
        repeat_neuron(w, 7, 3, canonical ? -2 : 1, 0.6);
        for (int h = 0; h < HIDDEN; h++)
            w[2 * PART + h * WIDTH + 3] *= 0.4;
        put_weights(&m.from, 5, w);
        m.centre[5] = -1;
        for (int32_t e = 1; e < 5; e++)
            m.guarded[e] = true;
        m.r.segment.sum_same_source = true;
        m.r.segment.canonical = canonical;
        m.r.segment.same_norm = same_norm;
        fill(&m);
        assert_int_equal(m.tally.moved, WIDTH);
        assert_true(apart(&m.from, 0, &m.into, 0) < 1e-6);
        m.r.segment.sum_same_source = false;
        fill(&m);
        assert_true(apart(&m.from, 0, &m.into, 0) > 1e-3);
        teardown(&m);
    }
}

/* Expert 5 has the neurons of 0 in another order, with their biases; half of 4's are like 1's. A kept expert's down bias is the mean
 * of its own and of those whose neurons it took, by saliency and their share; the biases of gate and up go with the neurons. */
static void biases_go_with_neurons(void **state)
{
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        merging m;
        double w[EXPERT_VALUES], other[EXPERT_VALUES];
        float down[EXPERTS][HIDDEN], got[HIDDEN], same[HIDDEN];
        setup_segments(&m, (rules){.biased = true, .clamped = true, .pairs = kind & 1}, 0.9);
        m.r.segment.response = kind & 2;
        repair_weights(w, &m.from, 1);
        repair_weights(other, &m.from, 4);
        memcpy(other, w, sizeof w);
        for (int j = 0; j < WIDTH / 2; j++) /* turned round, they are like nobody's */
            for (int h = 0; h < HIDDEN; h++) {
                other[PART + j * HIDDEN + h] *= -1;
                other[2 * PART + h * WIDTH + j] *= -1;
            }
        put_weights(&m.from, 4, other);
        plant_copy(&m, 5, 0, false);
        const moec_weight all = moec_weight_of(&m.from.down_bias), into = moec_weight_of(&m.into.down_bias);
        for (int h = 0; h < HIDDEN; h++)
            same[h] = (float)h;
        assert_int_equal(moec_weight_write(&all, same, HIDDEN, 5, 1, 0, HIDDEN, NULL), MOEC_OK);
        moec_weight_read(down[0], HIDDEN, &all, 0, EXPERTS, 0, HIDDEN);
        m.centre[4] = m.centre[5] = -1;
        m.saliency[0] = 3;
        m.saliency[4] = 2;
        fill(&m);
        assert_int_equal(m.tally.moved, WIDTH + WIDTH - WIDTH / 2);
        const double share = 2 * (double)(WIDTH - WIDTH / 2) / WIDTH;
        for (int32_t e = 0; e < 2; e++) {
            moec_weight_read(got, HIDDEN, &into, e, 1, 0, HIDDEN);
            for (int h = 0; h < HIDDEN; h++) {
                const double want = e == 0 ? (3 * (double)down[0][h] + (double)down[5][h]) / 4
                                           : ((double)down[1][h] + share * (double)down[4][h]) / (1 + share);
                assert_true(fabs((double)got[h] - want) < 1e-6 * (1 + fabs(want)));
            }
        }
        moec_weight_read(got, HIDDEN, &into, 2, 1, 0, HIDDEN);
        assert_memory_equal(got, down[2], sizeof got);
        float bias[2 * WIDTH], want[2 * WIDTH];
        const moec_weight in = bias_of(&m.from, 0), out = bias_of(&m.into, 0);
        moec_weight_read(want, 2, &in, 0, WIDTH, 0, 2);
        moec_weight_read(bias, 2, &out, 0, WIDTH, 0, 2);
        for (int i = 0; i < 2 * WIDTH && !(kind & 2); i++) /* else a neuron and its copy may both be centres */
            assert_true(fabsf(bias[i] - want[i]) < 1e-5f);
        assert_int_equal(moec_weight_write(&into, down[0], HIDDEN, 0, 1, 0, HIDDEN, NULL), MOEC_OK);
        assert_true(kind & 2 || apart(&m.from, 0, &m.into, 0) < 1e-5);
        teardown(&m);
    }
}

/* --- tokens, threads, types -------------------------------------------------------------------------------------------- */

static const struct {
    moec_merge_fill fill;
    moec_merge_align align;
    double rank;
    bool whiten, response;
} ways[] = {
    {MOEC_FILL_AVERAGE, MOEC_ALIGN_NONE, 1, false, false},        {MOEC_FILL_AVERAGE, MOEC_ALIGN_CANONICAL, 1, false, false},
    {MOEC_FILL_AVERAGE, MOEC_ALIGN_ACTIVATIONS, 1, false, false}, {MOEC_FILL_SUBSPACE, MOEC_ALIGN_NONE, 0.5, false, false},
    {MOEC_FILL_SUBSPACE, MOEC_ALIGN_PLAIN, 0.5, true, false},     {MOEC_FILL_SEGMENTS, MOEC_ALIGN_NONE, 1, false, false},
    {MOEC_FILL_SEGMENTS, MOEC_ALIGN_NONE, 1, false, true},
};

/* All of a filled target. */
static void filled(merging *m, rules r, size_t way)
{
    repair_seed = 99;
    setup(m, r);
    m->r.fill = ways[way].fill;
    m->r.align = ways[way].align;
    m->r.rank = ways[way].rank;
    m->r.whiten = ways[way].whiten;
    m->r.segment.response = ways[way].response;
    m->r.segment.canonical = true;
    m->r.segment.alpha = 0.1;
    m->r.router = m->r.fill == MOEC_FILL_SEGMENTS ? MOEC_ROW_ADD : MOEC_ROW_WEIGHTED;
    if (m->r.fill == MOEC_FILL_SEGMENTS)
        m->centre[0] = m->centre[5] = -1;
    else
        group(m, 3, 0, 5);
    fill(m);
}

static void threads_make_no_difference(void **state)
{
    static const rules kinds[] = {{.renorm = true, .n = 3000}, {.clamped = true, .biased = true, .pairs = true, .dtype = MOEC_BF16}};
    (void)state;
    for (size_t k = 0; k < MOEC_COUNT(kinds); k++)
        for (size_t i = 0; i < MOEC_COUNT(ways); i++) {
            merging one, two;
            moec_par_set_threads(1);
            filled(&one, kinds[k], i);
            moec_par_set_threads(2);
            filled(&two, kinds[k], i);
            moec_par_set_threads(0);
            assert_memory_equal(one.into.map, two.into.map, one.into.map_bytes);
            assert_true(memcmp(one.into.map, one.from.map, one.into.map_bytes) != 0);
            teardown(&one);
            teardown(&two);
        }
}

static void layouts_make_no_difference(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(ways); i++) {
        merging a, b;
        rules r = {.clamped = true, .biased = true};
        filled(&a, r, i);
        repair_seed = 99;
        r.pairs = true;
        setup(&b, r);
        for (int32_t e = 0; e < EXPERTS; e++) { /* the same experts, in the other layout */
            double w[EXPERT_VALUES];
            float bias[2 * WIDTH];
            const moec_weight in = bias_of(&a.from, e), out = bias_of(&b.from, e);
            repair_weights(w, &a.from, e);
            put_weights(&b.from, e, w);
            moec_weight_read(bias, 2, &in, 0, WIDTH, 0, 2);
            assert_int_equal(moec_weight_write(&out, bias, 2, 0, WIDTH, 0, 2, NULL), MOEC_OK);
        }
        memcpy(b.centre, a.centre, sizeof a.centre);
        memcpy(b.weight, a.weight, sizeof a.weight);
        b.r = a.r;
        fill(&b);
        for (int32_t e = 0; e < EXPERTS; e++) {
            double w[EXPERT_VALUES], v[EXPERT_VALUES];
            float x[2 * WIDTH], y[2 * WIDTH];
            const moec_weight in = bias_of(&a.into, e), out = bias_of(&b.into, e);
            if (a.centre[e] != e || unchanged(&a, e))
                continue;
            repair_weights(w, &a.into, e);
            repair_weights(v, &b.into, e);
            assert_memory_equal(w, v, sizeof w);
            moec_weight_read(x, 2, &in, 0, WIDTH, 0, 2);
            moec_weight_read(y, 2, &out, 0, WIDTH, 0, 2);
            assert_memory_equal(x, y, sizeof x);
            const moec_weight from = moec_weight_of(&a.into.down_bias), to = moec_weight_of(&b.into.down_bias);
            moec_weight_read(x, HIDDEN, &from, e, 1, 0, HIDDEN);
            moec_weight_read(y, HIDDEN, &to, e, 1, 0, HIDDEN);
            assert_memory_equal(x, y, HIDDEN * sizeof *x);
        }
        teardown(&a);
        teardown(&b);
    }
}

static void short_types_are_rounded_once(void **state)
{
    static const moec_dtype type[] = {MOEC_BF16, MOEC_F16};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(type); i++) {
        merging m;
        double all[3][EXPERT_VALUES], got[EXPERT_VALUES];
        static const int32_t who[] = {2, 0, 5};
        setup(&m, (rules){.dtype = type[i]});
        group(&m, 2, 0, 5);
        fill(&m);
        for (int k = 0; k < 3; k++)
            repair_weights(all[k], &m.from, who[k]);
        repair_weights(got, &m.into, 2);
        for (int j = 0; j < EXPERT_VALUES; j++) {
            const double want = 0.5 * all[0][j] + 0.2 * all[1][j] + 0.3 * all[2][j];
            assert_true(fabs(got[j] - want) <= (type[i] == MOEC_BF16 ? 0x1p-8 : 0x1p-11) * fabs(want) + 1e-7);
        }
        teardown(&m);
    }
}

static void what_cannot_be_is_refused(void **state)
{
    (void)state;
    merging m;
    double w[EXPERT_VALUES];
    setup(&m, (rules){.renorm = true});
    group(&m, 2, 0, 5);
    m.weight[0] = 0.9;
    assert_int_equal(run(&m), MOEC_EINVAL);
    m.weight[0] = 0.2;
    m.centre[2] = 4; /* a centre that goes elsewhere */
    assert_int_equal(run(&m), MOEC_EINVAL);
    m.centre[2] = 2;
    m.into.down.dtype = MOEC_F8_E4M3;
    assert_int_equal(run(&m), MOEC_EINVAL);
    assert_non_null(strstr(m.err.text, "down of expert"));
    m.into.down.dtype = MOEC_F32;
    m.r.fill = MOEC_FILL_SEGMENTS;
    m.r.segment.up = m.r.segment.down = 0;
    assert_int_equal(run(&m), MOEC_EINVAL);
    m.r.fill = MOEC_FILL_AVERAGE;
    repair_weights(w, &m.from, 5);
    w[77] = 1e30;
    put_weights(&m.from, 5, w);
    ((float *)(uintptr_t)m.from.gate_up.data)[5 * 2 * PART + 11] = NAN;
    assert_int_equal(run(&m), MOEC_ENUMERIC);
    teardown(&m);
    for (int fills = 0; fills < 2; fills++) { /* a mean norm is within what F16 holds, a sum of columns need not be */
        setup(&m, (rules){.dtype = MOEC_F16});
        m.r.fill = fills ? MOEC_FILL_SEGMENTS : MOEC_FILL_AVERAGE;
        m.r.segment.sum_same_source = true;
        m.r.segment.alpha = -1;
        repair_weights(w, &m.from, 5);
        for (int j = 0; j < WIDTH; j++) {
            repeat_neuron(w, j, 0, 1, 1);
            for (int h = 0; h < HIDDEN; h++)
                w[2 * PART + h * WIDTH + j] = 60000;
        }
        put_weights(&m.from, 5, w);
        if (fills)
            m.centre[5] = -1;
        else
            group(&m, 2, 0, 5);
        m.weight[2] = fills ? 1 : 0.5;
        if (!fills) { /* weights whose sum is 1 cannot overflow: the target's type is narrower than the source's */
            teardown(&m);
            setup(&m, (rules){.renorm = true});
            group(&m, 2, 0, 5);
            repair_weights(w, &m.from, 5);
            w[0] = 1e6;
            put_weights(&m.from, 5, w);
            m.into.gate_up.dtype = MOEC_F16;
        }
        m.saliency[5] = 1e6;
        assert_int_equal(run(&m), MOEC_ENUMERIC);
        assert_non_null(strstr(m.err.text, "expert"));
        teardown(&m);
    }
}

static void memory_is_let_go(void **state)
{
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(ways); i++) {
        merging m;
        filled(&m, (rules){.renorm = true}, i);
        long left = 0;
        moec_status st = MOEC_ENOMEM;
        for (; left < 500 && st != MOEC_OK; left++) {
            moec_test_allocs_left = left;
            st = run(&m);
            moec_test_allocs_left = LONG_MAX;
            assert_true(st == MOEC_OK || st == MOEC_ENOMEM);
        }
        assert_int_equal(st, MOEC_OK);
        assert_true(left > 5);
        assert_true(moec__merge_fill_bytes(&m.from.model, &m.r) > 1000);
        teardown(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copies_give_the_centre),
        cmocka_unit_test(equal_members_change_nothing),
        cmocka_unit_test(subspaces_project),
        cmocka_unit_test(dead_members_do_not_count),
        cmocka_unit_test(guarded_experts_stay),
        cmocka_unit_test(alpha_decides_who_moves),
        cmocka_unit_test(biases_go_with_neurons),
        cmocka_unit_test(same_source_adds_up),
        cmocka_unit_test(threads_make_no_difference),
        cmocka_unit_test(layouts_make_no_difference),
        cmocka_unit_test(short_types_are_rounded_once),
        cmocka_unit_test(what_cannot_be_is_refused),
        cmocka_unit_test(memory_is_let_go),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
