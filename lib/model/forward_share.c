/* Steps that treat tokens one by one, divided among the threads of a chunk that runs alone. Who takes which part changes no
 * bit: every value is computed by one thread, in the order in which one thread alone would compute it. */
#include "base/par.h"
#include "model/forward_parts.h"
#include "num/vec.h"

enum { SHARE = 1 << 16 }; /* floats for which waking a thread pays */

void moec__share(const moec_forward *f, int64_t n, int64_t each, moec_range_fn *fn, void *ctx)
{
    int64_t grain = each > 0 && each < SHARE ? SHARE / each : 1;
    moec_err none = {MOEC_OK, ""};
    moec_status st = moec_par_for(n, f->o.threads > 1 ? grain : n, fn, ctx, &none);
    (void)st; /* fn does not fail */
}

typedef struct rows {
    const moec_forward *f;
    float *y;
    const float *x, *w, *bias, *scale;
    const int32_t *at;
    int64_t n, width, ld;
} rows;

/* Tokens of panels [lo, hi). */
static int64_t tokens(const rows *r, int64_t lo, int64_t hi)
{
    return (hi * MOEC_PANEL < r->n ? hi * MOEC_PANEL : r->n) - lo * MOEC_PANEL;
}

static moec_status pack(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rows *r = ctx;
    int64_t t = lo * MOEC_PANEL;
    (void)worker;
    (void)err;
    moec_panel_pack(r->y + t * r->width, r->at ? r->x : r->x + t * r->ld, r->ld, r->at ? r->at + t : NULL, tokens(r, lo, hi),
                    r->width);
    return MOEC_OK;
}

static moec_status unpack(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rows *r = ctx;
    int64_t t = lo * MOEC_PANEL;
    (void)worker;
    (void)err;
    moec_panel_unpack(r->y + t * r->ld, r->ld, r->x + t * r->width, tokens(r, lo, hi), r->width);
    return MOEC_OK;
}

static moec_status scatter(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rows *r = ctx;
    int64_t t = lo * MOEC_PANEL;
    (void)worker;
    (void)err;
    moec_panel_scatter_add(r->y, r->ld, r->at + t, r->scale + t, r->x + t * r->width, tokens(r, lo, hi), r->width);
    return MOEC_OK;
}

static moec_status norm(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rows *r = ctx;
    (void)worker;
    (void)err;
    moec__norm(r->y + lo * r->width, r->x + lo * r->width, r->w, r->bias, r->f->m, hi - lo, r->width);
    return MOEC_OK;
}

static moec_status add(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    const rows *r = ctx;
    (void)worker;
    (void)err;
    moec_add(r->y + lo * r->width, r->x + lo * r->width, (hi - lo) * r->width);
    return MOEC_OK;
}

void moec__share_pack(const moec_forward *f, float *out, const float *x, int64_t ldx, const int32_t *at, int64_t n,
                      int64_t width)
{
    rows r = {.y = out, .x = x, .ld = ldx, .at = at, .n = n, .width = width};
    moec__share(f, moec_panels(n), width * MOEC_PANEL, pack, &r);
}

void moec__share_unpack(const moec_forward *f, float *y, int64_t ldy, const float *panels, int64_t n, int64_t width)
{
    rows r = {.y = y, .x = panels, .ld = ldy, .n = n, .width = width};
    moec__share(f, moec_panels(n), width * MOEC_PANEL, unpack, &r);
}

void moec__share_scatter(const moec_forward *f, float *y, int64_t ldy, const int32_t *at, const float *scale,
                         const float *panels, int64_t n, int64_t width)
{
    rows r = {.y = y, .x = panels, .ld = ldy, .at = at, .scale = scale, .n = n, .width = width};
    moec__share(f, moec_panels(n), width * MOEC_PANEL, scatter, &r);
}

void moec__share_norm(const moec_forward *f, float *y, const float *x, const float *w, const float *bias, int64_t n,
                      int64_t width)
{
    rows r = {.f = f, .y = y, .x = x, .w = w, .bias = bias, .width = width};
    moec__share(f, n, width, norm, &r);
}

void moec__share_add(const moec_forward *f, float *y, const float *x, int64_t n, int64_t width)
{
    rows r = {.y = y, .x = x, .width = width};
    moec__share(f, n, width, add, &r);
}
