/* See repair_layer.h. */
#include "repair_layer.h"

#include "base/mem.h"
#include "num/linalg.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

uint64_t repair_seed = 88172645463325252u;

float repair_uniform(float low, float high)
{
    repair_seed ^= repair_seed << 13;
    repair_seed ^= repair_seed >> 7;
    repair_seed ^= repair_seed << 17;
    return low + (high - low) * (float)(repair_seed >> 40) / 16777216.0f;
}

/* Roughly normal. */
float repair_normal(void)
{
    float sum = 0.0f;
    for (int i = 0; i < 4; i++)
        sum += repair_uniform(-1.0f, 1.0f);
    return sum * 0.866f;
}


static void put(const moec_tensor *t, int64_t i, float v)
{
    const moec_weight w = {.of = t, .rows = 1, .cols = 1, .at = i, .row_step = 1, .col_step = 1};
    assert_int_equal(moec_weight_write(&w, &v, 1, 0, 1, 0, 1, NULL), MOEC_OK);
}

/* n values of about `size`. */
static void make_tensor(fixture *f, moec_tensor *t, const char *name, int64_t n, float size)
{
    *t = (moec_tensor){.name = name, .dtype = f->r.dtype, .rank = 1, .dim = {n}, .data = f->map + f->used};
    t->bytes = (size_t)(n * moec_dtypes[t->dtype].bytes);
    f->used = (f->used + t->bytes + 4095) / 4096 * 4096;
    assert_true(f->used <= f->map_bytes);
    for (int64_t i = 0; i < n; i++)
        put(t, i, size * repair_normal());
}

moec_weight repair_view(const moec_tensor *t, int64_t at, int64_t rows, int64_t cols, int64_t row_step, int64_t col_step)
{
    moec_weight w = {.of = t, .rows = rows, .cols = cols, .at = at, .row_step = row_step, .col_step = col_step};
    assert_int_equal(moec_weight_check(&w, NULL), MOEC_OK);
    return w;
}

static void make_experts(fixture *f)
{
    enum { H = HIDDEN, I = WIDTH };
    make_tensor(f, &f->gate_up, "gate_up", EXPERTS * 2 * I * H, 0.3f);
    make_tensor(f, &f->down, "down", EXPERTS * I * H, 0.3f);
    for (int64_t e = 0; e < EXPERTS; e++) {
        const int64_t at = e * 2 * I * H, d = e * I * H;
        moec_mlp *m = &f->expert[e];
        if (f->r.pairs) { /* [E,H,2I], [E,I,H] */
            m->gate = repair_view(&f->gate_up, at, I, H, 2, 2 * I);
            m->up = repair_view(&f->gate_up, at + 1, I, H, 2, 2 * I);
            m->down = repair_view(&f->down, d, H, I, 1, H);
        } else {
            m->gate = repair_view(&f->gate_up, at, I, H, H, 1);
            m->up = repair_view(&f->gate_up, at + I * H, I, H, H, 1);
            m->down = repair_view(&f->down, d, H, I, I, 1);
        }
    }
    if (!f->r.biased)
        return;
    make_tensor(f, &f->gate_up_bias, "gate_up_bias", EXPERTS * 2 * I, 0.3f);
    make_tensor(f, &f->down_bias, "down_bias", EXPERTS * H, 0.3f);
    f->layer.gate_up_bias = &f->gate_up_bias;
    f->layer.down_bias = &f->down_bias;
}

/* The experts in the middle stay, the first one goes. */
static void make_task(fixture *f)
{
    const rules *r = &f->r;
    moec_repair_task *t = &f->task;
    for (int64_t i = 0; i < EXPERTS; i++)
        f->removed[i] = true;
    for (int64_t i = 0; i < r->keep; i++) {
        f->keep[i] = (int32_t)(i + (r->keep < EXPERTS));
        f->removed[f->keep[i]] = false;
    }
    *t = (moec_repair_task){.model = &f->model, .layer = &f->layer, .keep = f->keep, .n_keep = r->keep, .n = r->n,
                            .n_fit = r->n_fit, .x = f->x, .rest = f->rest, .weight = f->weight, .ids = f->ids,
                            .gates = f->gates, .slots = r->slots};
    make_tensor(f, &f->router, "router", r->keep * HIDDEN, 0.5f);
    if (r->router)
        t->router = repair_view(&f->router, 0, r->keep, HIDDEN, HIDDEN, 1);
    for (int64_t i = 0; i < r->keep; i++)
        f->router_bias[i] = repair_normal();
    if (r->router_bias)
        t->router_bias = f->router_bias;
    float logits[EXPERTS];
    for (int64_t i = 0; i < r->n; i++) {
        for (int64_t e = 0; e < EXPERTS; e++)
            logits[e] = -INFINITY;
        for (int64_t e = 0; e < r->keep; e++) {
            float row[HIDDEN], bias = r->router_bias ? f->router_bias[e] : 0.0f;
            moec_dtypes[r->dtype].to_f32(row, (char *)f->router.data + e * HIDDEN * moec_dtypes[r->dtype].bytes, HIDDEN);
            logits[f->keep[e]] = moec_sdot(row, f->x + i * HIDDEN, HIDDEN) + bias;
        }
        moec_route(logits, f->ids + i * r->slots, f->gates + i * r->slots, logits, &f->model, &f->layer, 1);
    }
}

void repair_setup(fixture *f, rules r)
{
    moec_dims *d = &f->model.dims;
    memset(f, 0, sizeof *f);
    r.n = r.n ? r.n : 600;
    r.n_fit = r.n_fit ? r.n_fit : r.n * 2 / 3;
    r.keep = r.keep ? r.keep : 4;
    r.slots = r.slots ? r.slots : 2;
    r.dtype = r.dtype ? r.dtype : MOEC_F32;
    r.scale = r.scale > 0.0 ? r.scale : 1.0;
    f->r = r;
    f->map_bytes = 1 << 20;
    int fd = memfd_create("repair", 0);
    assert_true(fd >= 0 && ftruncate(fd, (off_t)f->map_bytes) == 0);
    f->map = mmap(NULL, f->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(f->map != MAP_FAILED);
    close(fd);
    f->family = (moec_family){.score = r.score, .choice = r.choice, .weight_on_input = r.on_input,
                              .activation = r.clamped ? MOEC_ACT_SWIGLU_CLAMPED : MOEC_ACT_SWIGLU};
    f->model.family = &f->family;
    *d = (moec_dims){.hidden = HIDDEN, .experts = EXPERTS, .top_k = r.slots, .slots = r.slots, .expert_width = WIDTH,
                     .groups = 1, .top_groups = 1, .renorm = r.renorm, .route_scale = r.scale, .act_limit = 1.5,
                     .act_alpha = 1.702};
    f->layer.expert = f->expert;
    f->layer.removed = f->removed;
    f->layer.layout = r.pairs ? MOEC_LAYOUT_IN_OUT_PAIRS : MOEC_LAYOUT_OUT_IN;
    assert_int_equal(MOEC_NEW(f->x, (size_t)(r.n * HIDDEN), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(f->y, (size_t)(r.n * HIDDEN), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(f->rest, (size_t)(r.n * HIDDEN), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(f->weight, (size_t)r.n, NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(f->gates, (size_t)(r.n * r.slots), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(f->ids, (size_t)(r.n * r.slots), NULL), MOEC_OK);
    for (int64_t i = 0; i < r.n * HIDDEN; i++)
        f->x[i] = repair_normal();
    for (int64_t i = 0; i < r.n; i++)
        f->weight[i] = repair_uniform(0.5f, 2.0f);
    make_experts(f);
    make_task(f);
}

void repair_teardown(fixture *f)
{
    munmap(f->map, f->map_bytes);
    moec_free(f->x);
    moec_free(f->y);
    moec_free(f->rest);
    moec_free(f->weight);
    moec_free(f->gates);
    moec_free(f->ids);
}

/* ---- the plain statement ------------------------------------------------------------------------------------------------ */

/* An expert's weights as float64: gate, up, down, as moec_piece has them. */
void repair_weights(double *out, const fixture *f, int32_t e)
{
    enum { PART = HIDDEN * WIDTH };
    float v[3 * PART];
    moec_weight_read(v, HIDDEN, &f->expert[e].gate, 0, WIDTH, 0, HIDDEN);
    moec_weight_read(v + PART, HIDDEN, &f->expert[e].up, 0, WIDTH, 0, HIDDEN);
    moec_weight_read(v + 2 * PART, WIDTH, &f->expert[e].down, 0, HIDDEN, 0, WIDTH);
    for (int i = 0; i < 3 * PART; i++)
        out[i] = (double)v[i];
}

static double bias_of(const moec_tensor *t, int64_t i)
{
    float v;
    const moec_weight w = {.of = t, .rows = 1, .cols = 1, .at = i, .row_step = 1, .col_step = 1};
    moec_weight_read(&v, 1, &w, 0, 1, 0, 1);
    return (double)v;
}

/* a = act(gate x, up x) */
void repair_act(double *a, const fixture *f, const double *w, int32_t e, const float *x, double times)
{
    const double limit = f->model.dims.act_limit, alpha = f->model.dims.act_alpha;
    for (int64_t i = 0; i < WIDTH; i++) {
        double g = 0, u = 0;
        if (f->r.biased) {
            g = bias_of(&f->gate_up_bias, e * 2 * WIDTH + (f->r.pairs ? 2 * i : i));
            u = bias_of(&f->gate_up_bias, e * 2 * WIDTH + (f->r.pairs ? 2 * i + 1 : WIDTH + i));
        }
        for (int64_t j = 0; j < HIDDEN; j++) {
            g += w[i * HIDDEN + j] * times * (double)x[j];
            u += w[(WIDTH + i) * HIDDEN + j] * times * (double)x[j];
        }
        if (f->r.clamped) {
            g = fmin(g, limit);
            a[i] = (fmax(fmin(u, limit), -limit) + 1) * g / (1 + exp(-alpha * g));
        } else {
            a[i] = g / (1 + exp(-g)) * u;
        }
    }
}

/* r += gate f_e(x) */
void repair_add(double *r, const fixture *f, const double *w, int32_t e, const float *x, double gate)
{
    double a[WIDTH], in = f->r.on_input ? gate : 1, out = f->r.on_input ? 1 : gate;
    repair_act(a, f, w, e, x, in);
    for (int64_t h = 0; h < HIDDEN; h++) {
        double sum = f->r.biased ? bias_of(&f->down_bias, e * HIDDEN + h) : 0;
        for (int64_t i = 0; i < WIDTH; i++)
            sum += w[2 * HIDDEN * WIDTH + h * WIDTH + i] * a[i];
        r[h] += out * sum;
    }
}

static void naive_routed(double *r, const fixture *f, double (*w)[EXPERT_VALUES], int64_t t)
{
    memset(r, 0, HIDDEN * sizeof *r);
    for (int64_t j = t * f->r.slots; j < (t + 1) * f->r.slots; j++)
        if (f->ids[j] >= 0)
            repair_add(r, f, w[f->ids[j]], f->ids[j], f->x + t * HIDDEN, (double)f->gates[j]);
}

/* y = what the layer gives + noise; `rest` is y. */
void repair_aim(fixture *f, float noise)
{
    double (*w)[EXPERT_VALUES] = malloc(EXPERTS * sizeof *w), r[HIDDEN];
    assert_non_null(w);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(w[e], f, e);
    for (int64_t t = 0; t < f->r.n; t++) {
        naive_routed(r, f, w, t);
        for (int64_t h = 0; h < HIDDEN; h++)
            f->y[t * HIDDEN + h] = (float)r[h] + noise * repair_normal();
    }
    memcpy(f->rest, f->y, (size_t)(f->r.n * HIDDEN) * sizeof *f->rest);
    free(w);
}

/* Every value of these tensors is moved by about `size`. */
void repair_shake(const moec_tensor *t, float size)
{
    const int64_t n = (int64_t)t->bytes / moec_dtypes[t->dtype].bytes;
    for (int64_t i = 0; i < n; i++)
        put(t, i, (float)bias_of(t, i) + size * repair_normal());
}

/* rest is y minus what the layer gives, whatever was done to the layer. */
void repair_rest_is_right(const fixture *f, double tolerance)
{
    double (*w)[EXPERT_VALUES] = malloc(EXPERTS * sizeof *w), r[HIDDEN];
    assert_non_null(w);
    for (int32_t e = 0; e < EXPERTS; e++)
        repair_weights(w[e], f, e);
    for (int64_t t = 0; t < f->r.n; t++) {
        naive_routed(r, f, w, t);
        for (int64_t h = 0; h < HIDDEN; h++)
            assert_true(fabs((double)f->y[t * HIDDEN + h] - r[h] - (double)f->rest[t * HIDDEN + h]) <= tolerance);
    }
    free(w);
}

void repair_start(fixture *f)
{
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_repair_start(&f->task, &err), MOEC_OK);
}
