/* See quantize_plan.h. */
#include "run/quantize_plan.h"

#include "base/log.h"
#include "base/mem.h"
#include "run/apply.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WHOLE = 16, TRIES = 12 };

static int64_t weights_of(const moec_model *m)
{
    return m->moe_layers * m->dims.experts * 3 * m->dims.hidden * m->dims.expert_width;
}

static moec_status check_request(const moec_quantize_request *r, moec_err *err)
{
    const moec_model *m = r->q->model;
    const moec_qformat *f = r->format;
    if (m->moe_layers == 0)
        return moec_fail(err, MOEC_EINVAL, "the model has no layer with routed experts");
    if ((r->bits > 0.0) == (r->target > 0))
        return moec_fail(err, MOEC_EINVAL, r->target > 0 ? "--bits and --target-size say the same thing; give one"
                                                         : "how small? give --bits 2.5 or --target-size 12GiB");
    if (r->zeros && !f->zeros)
        return moec_fail(err, MOEC_EINVAL, "format %s has no zero points that its clients read; --format gptq and fake have", f->name);
    if (r->grain < f->grain && f->grain >= MOEC_WIDTHS_LAYER)
        return moec_fail(err, MOEC_EINVAL, "format %s: its clients load one width for %s; a mix inside would not load, or load wrong",
                         f->name, f->grain == MOEC_WIDTHS_MODEL ? "all routed experts" : "the experts of a layer");
    for (int i = 0; i < r->n_widths; i++)
        if (r->width[i] != WHOLE && (r->width[i] < 1 || r->width[i] > MOEC_QUANT_BITS || !(f->widths >> r->width[i] & 1)))
            return moec_fail(err, MOEC_EINVAL, "format %s has no %d-bit codes", f->name, r->width[i]);
    const struct {
        const char *name;
        int bits;
    } other[] = {{"attention", r->attention}, {"shared", r->shared}, {"dense", r->dense}};
    for (size_t i = 0; i < MOEC_COUNT(other); i++)
        if (other[i].bits != WHOLE && (other[i].bits < 1 || other[i].bits > MOEC_QUANT_BITS || !(f->widths >> other[i].bits & 1)))
            return moec_fail(err, MOEC_EINVAL, "--%s-bits %d: format %s has no such codes", other[i].name, other[i].bits, f->name);
    return MOEC_OK;
}

static bool of_attention(moec_mat which)
{
    return which < MOEC_MAT_ROUTER;
}

static int asked_bits(const moec_quantize_request *r, moec_mat which)
{
    return of_attention(which) ? r->attention
           : which >= MOEC_MAT_SHARED_GATE && which <= MOEC_MAT_SHARED_DOWN ? r->shared
           : which >= MOEC_MAT_DENSE_GATE && which <= MOEC_MAT_DENSE_DOWN   ? r->dense : WHOLE;
}

/* The other matrices; what the format does not take stays: *out of them. */
static moec_status set_others(int64_t *out, moec_plan *p, const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    int64_t left = 0;
    p->quant.n_mat_layers = m->dims.layers;
    MOEC_TRY(MOEC_NEW(p->quant.mat, (size_t)m->dims.layers * MOEC_MAT_COUNT, err));
    for (int64_t l = 0; l < m->dims.layers; l++)
        for (moec_mat i = 0; i < MOEC_MAT_COUNT; i++) {
            const int bits = asked_bits(r, i);
            if (!m->layer[l].mat[i].of || bits >= WHOLE)
                continue;
            if (moec_qformat_takes(r->format, &p->quant, &m->layer[l], i))
                p->quant.mat[l * MOEC_MAT_COUNT + i] = (uint8_t)bits;
            else
                left++;
        }
done:
    *out = left;
    return st;
}

int64_t moec_quantize_group(const moec_model *m)
{
    return m->dims.expert_width < 1024 || m->dims.hidden < 1024 ? 64 : 128;
}

/* Of the output's experts. */
static moec_dtype float_type(const moec_quantize_request *r)
{
    const moec_layer *l = moec_set_layer(r->q->model, 0);
    const moec_dtype t = r->q->dtype < MOEC_DTYPE_COUNT ? r->q->dtype : l->expert[0].gate.of->dtype;
    return t == MOEC_F32 || t == MOEC_F16 ? t : MOEC_BF16;
}

/* Who is protected, into the plan. */
static moec_status set_guarded(moec_plan *p, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t E = q->model->dims.experts;
    if (!q->guard || !q->guard->flag)
        return MOEC_OK;
    for (int64_t i = 0; i < q->model->moe_layers; i++) {
        moec_plan_layer *l = &p->layer[i];
        MOEC_TRY(MOEC_NEW(l->guarded, (size_t)E, err));
        for (int64_t e = 0; e < E; e++)
            if (q->guard->flag[i * E + e])
                l->guarded[l->n_guarded++] = (int32_t)e;
    }
    if (q->guard_name)
        MOEC_TRY(moec_plan_set_option(p, "protect", moec_json_new_string(q->guard_name), err));
done:
    return st;
}

/* Clients that want one width want one group size, too. */
static int64_t common_group(const moec_quantize_request *r)
{
    const moec_dims *d = &r->q->model->dims;
    const int64_t asked = r->usual_group > 0 ? r->usual_group : moec_quantize_group(r->q->model);
    const int64_t in = moec_quant_group(asked, d->hidden, r->format->group_multiple);
    const int64_t down = moec_quant_group(asked, d->expert_width, r->format->group_multiple);
    return r->format->grain < MOEC_WIDTHS_LAYER || in == 0 || down == 0 ? asked : in < down ? in : down;
}

static moec_status new_plan(moec_plan **out, int64_t *left, const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    moec_plan *p = NULL;
    *out = NULL;
    MOEC_TRY(moec_plan_whole(&p, m, err));
    snprintf(p->method, sizeof p->method, "%s", r->method->name);
    snprintf(p->model, sizeof p->model, "%s", r->q->fingerprint ? r->q->fingerprint : "");
    snprintf(p->stats, sizeof p->stats, "%s", r->q->stats_digest ? r->q->stats_digest : "");
    p->dtype = r->q->dtype;
    snprintf(p->quant.format, sizeof p->quant.format, "%s", r->format->name);
    p->quant.group = r->group > 0 ? r->group : common_group(r);
    p->quant.zeros = r->zeros;
    p->quant.scale_type = r->format->dense ? MOEC_F32 : r->format->scale_type < MOEC_DTYPE_COUNT ? r->format->scale_type : float_type(r);
    MOEC_TRY(MOEC_NEW(p->quant.expert, (size_t)(3 * m->moe_layers * m->dims.experts), err));
    MOEC_TRY(set_others(left, p, r, err));
    MOEC_TRY(set_guarded(p, r->q, err));
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

static void set_widths(moec_plan *p, const moec_quantize_request *r, const uint8_t *bits)
{
    const moec_model *m = r->q->model;
    memcpy(p->quant.expert, bits, (size_t)(3 * m->moe_layers * m->dims.experts));
    moec_qformat_mark(p, r->format);
}

/* Bytes of all files of the output, at most: the manifest, which holds hashes and errors that are not known yet, is counted with room. */
static moec_status size_of(uint64_t *out, moec_plan *p, const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_apply_result size = {0};
    char *text = NULL;
    const moec_apply_options o = {.fingerprint = r->q->fingerprint};
    snprintf(p->weights, sizeof p->weights, "not made yet");
    MOEC_TRY(moec_apply_estimate(&size, r->q->model, p, &o, err));
    MOEC_TRY(moec_plan_to_text(&text, p, err));
    *out = size.disk_bytes + size.manifest_bytes + strlen(text) + 80 * (uint64_t)p->n_layers + 512; /* errors, options */
done:
    p->weights[0] = '\0';
    moec_free(text);
    return st;
}

/* Is the target possible? `all`: room for every width; *least: the output's bytes with the narrowest, which the plan has then. */
static moec_status check_target(uint64_t *least, moec_plan *p, uint8_t *all, int narrowest, const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    char a[32], b[32];
    memset(all, narrowest, (size_t)(3 * m->moe_layers * m->dims.experts));
    set_widths(p, r, all);
    MOEC_TRY(size_of(least, p, r, err));
    moec_size_text(a, sizeof a, r->target);
    if (r->target < *least)
        st = moec_fail(err, MOEC_ENOFIT, "--target-size %s: with every routed expert at %d bits the output has %s", a, narrowest,
                       moec_size_text(b, sizeof b, *least));
    else if (r->target > moec_ckpt_bytes(m->ckpt))
        st = moec_fail(err, MOEC_ENOFIT, "--target-size %s is more than the model's weights have now, %s", a,
                       moec_size_text(b, sizeof b, moec_ckpt_bytes(m->ckpt)));
done:
    return st;
}

/* Widths for a budget of bytes: what is not routed experts is counted, then what the solver's answer differs from the target. */
static moec_status meet_target(moec_plan *p, moec_widths *w, const moec_quantize_request *r, moec_widths_request *ask, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    const int64_t n = 3 * m->moe_layers * m->dims.experts;
    char a[32];
    uint64_t least = 0, routed = 0, size = 0;
    uint8_t *low = NULL;
    MOEC_TRY(MOEC_NEW(low, (size_t)n, err));
    MOEC_TRY(check_target(&least, p, low, ask->width[0], r, err));
    for (int k = 0; k < 3; k++)
        routed += ask->bytes[k * ask->n_widths] * (uint64_t)(m->moe_layers * m->dims.experts);
    ask->budget = r->target - (least - routed);
    for (int i = 0; i < TRIES; i++) {
        moec_widths_release(w);
        MOEC_TRY(moec_widths_solve(w, r->method, ask, err));
        set_widths(p, r, w->bits);
        MOEC_TRY(size_of(&size, p, r, err));
        if (size <= r->target)
            goto done;
        if (w->bytes <= routed)
            break;
        ask->budget = w->bytes - (size - r->target); /* names and numbers in headers differ in length */
        ask->budget = size - r->target > w->bytes - routed ? routed : ask->budget;
    }
    st = moec_fail(err, MOEC_ENOFIT, "--target-size %s: no widths were found that meet it", moec_size_text(a, sizeof a, r->target));
done:
    moec_free(low);
    return st;
}

static int candidates(int width[8], const moec_quantize_request *r)
{
    static const int usual[] = {2, 3, 4, 8};
    int n = r->n_widths;
    memcpy(width, r->width, sizeof r->width);
    for (size_t i = 0; r->n_widths == 0 && i < MOEC_COUNT(usual); i++)
        if ((r->format->widths >> usual[i] & 1) && !(r->format->nested && usual[i] > 4 && r->bits <= 4.0)) /* planes that nobody asked for */
            width[n++] = usual[i];
    return n;
}

moec_status moec_quantize_check(const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    const size_t n = (size_t)(3 * m->moe_layers * m->dims.experts);
    moec_plan *p = NULL;
    uint8_t *all = NULL;
    uint64_t least;
    int64_t left;
    int width[8];
    MOEC_TRY(check_request(r, err));
    const int widths = candidates(width, r);
    if (r->bits > 0.0 && r->bits < (double)width[0])
        MOEC_TRY(moec_fail(err, MOEC_ENOFIT, "--bits %g: the least that is possible is %d", r->bits, width[0]));
    if (r->bits > (double)width[widths - 1])
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "--bits %g: the widest to choose from is %d", r->bits, width[widths - 1]));
    MOEC_TRY(new_plan(&p, &left, r, err));
    MOEC_TRY(MOEC_NEW(all, n, err));
    for (int i = 0; i < widths; i++) { /* each as if it were everyone's */
        if (width[i] == WHOLE)
            continue;
        memset(all, width[i], n);
        set_widths(p, r, all);
        snprintf(p->weights, sizeof p->weights, "not made yet");
        MOEC_TRY(moec_plan_check(p, m, r->q->fingerprint, err));
        MOEC_TRY(moec_qformat_check(p, m, err));
    }
    if (r->target > 0)
        MOEC_TRY(check_target(&least, p, all, width[0], r, err));
done:
    moec_free(all);
    moec_plan_free(p);
    return st;
}

moec_status moec_quantize_plan(moec_plan **out, moec_widths *widths, const moec_quantize_request *r, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = r->q->model;
    moec_plan *p = NULL;
    uint64_t bytes[3 * 8];
    int64_t left = 0;
    *out = NULL;
    *widths = (moec_widths){.bits = NULL};
    MOEC_TRY(check_request(r, err));
    moec_widths_request ask = {.q = r->q, .grain = r->grain > r->format->grain ? r->grain : r->format->grain, .bits = r->bits,
                               .bytes = bytes, .n_widths = r->n_widths, .alpha = r->alpha, .beta = r->beta, .gamma = r->gamma};
    if (r->format->grain == MOEC_WIDTHS_PROJECTION || r->format->grain == MOEC_WIDTHS_EXPERT)
        ask.grain = r->grain; /* both load; which is the user's */
    ask.n_widths = candidates(ask.width, r);
    MOEC_TRY(new_plan(&p, &left, r, err));
    if (left > 0)
        moec_note("%lld other matrices stay as they are: format %s does not take their form", (long long)left, r->format->name);
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < ask.n_widths; i++)
            bytes[k * ask.n_widths + i] = moec_qformat_bytes(r->format, &p->quant, m, k, ask.width[i]);
    if (r->target > 0) {
        MOEC_TRY(meet_target(p, widths, r, &ask, err));
    } else {
        MOEC_TRY(moec_widths_solve(widths, r->method, &ask, err));
        set_widths(p, r, widths->bits);
    }
    if (r->format->check)
        MOEC_TRY(r->format->check(p, m, err));
    MOEC_TRY(moec_plan_set_option(p, r->target > 0 ? "target_size" : "bits",
                                  r->target > 0 ? moec_json_new_int((int64_t)r->target) : moec_json_new_real(r->bits), err));
    if (isfinite(widths->cost)) {
        MOEC_TRY(moec_plan_set_option(p, "cost", moec_json_new_real(widths->cost), err));
        MOEC_TRY(moec_plan_set_option(p, "bound", moec_json_new_real(widths->bound), err));
    }
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    if (st != MOEC_OK)
        moec_widths_release(widths);
    return st;
}

void moec_quantize_means(double *bits, double *disk, const moec_plan *p, const moec_model *m)
{
    const moec_qformat *f = moec_qformat_find(p->quant.format);
    const int64_t items = 3 * m->moe_layers * m->dims.experts;
    double sum = 0.0, bytes = 0.0;
    for (int64_t i = 0; i < items; i++) {
        sum += (double)p->quant.expert[i];
        bytes += f ? (double)moec_qformat_bytes(f, &p->quant, m, (int)(i % 3), p->quant.expert[i]) : 0.0;
    }
    *bits = sum / (double)items;
    *disk = 8.0 * bytes / (double)weights_of(m);
}
