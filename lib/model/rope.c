/* Rotary position embedding: frequencies of every scaling kind in use, from either config dialect. */
#include "model/model.h"

#include <math.h>
#include <string.h>

static const double pi = 3.14159265358979323846;

static const struct {
    const char *name;
    moec_rope_kind kind;
} kinds[] = {
    {"default", MOEC_ROPE_DEFAULT}, {"linear", MOEC_ROPE_LINEAR}, {"dynamic", MOEC_ROPE_DYNAMIC},
    {"yarn", MOEC_ROPE_YARN},       {"llama3", MOEC_ROPE_LLAMA3},
};

static double real_or(const moec_json *o, const char *key, double fallback)
{
    double v = fallback;
    (void)moec_json_real(moec_json_get(o, key), &v);
    return v;
}

static moec_status read_kind(moec_rope *r, const moec_json *scaling, moec_err *err)
{
    const char *name = moec_json_string(moec_json_get(scaling, "rope_type"));
    if (!name)
        name = moec_json_string(moec_json_get(scaling, "type"));
    r->kind = MOEC_ROPE_DEFAULT;
    if (!name)
        return MOEC_OK;
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        if (strcmp(kinds[i].name, name) == 0) {
            r->kind = kinds[i].kind;
            return MOEC_OK;
        }
    return moec_fail(err, MOEC_EFORMAT, "config.json: rope type %.40s is not known (default, linear, dynamic, yarn, llama3)",
                     name);
}

moec_status moec_rope_read(moec_rope *out, const moec_json *config, int64_t width, double default_theta, moec_err *err)
{
    moec_rope *r = out;
    memset(r, 0, sizeof *r);
    /* rope_scaling is transformers 4's name and replaces rope_parameters when both are there, as transformers 5 reads it. */
    const moec_json *scaling = moec_json_get(config, "rope_scaling");
    if (moec_json_type(scaling) != MOEC_JSON_OBJECT)
        scaling = moec_json_get(config, "rope_parameters");
    moec_status st = read_kind(r, scaling, err);
    if (st != MOEC_OK)
        return st;
    r->theta = real_or(scaling, "rope_theta", real_or(config, "rope_theta", default_theta));
    double partial = real_or(scaling, "partial_rotary_factor", real_or(config, "partial_rotary_factor", 1.0));
    r->max_positions = 2048;
    (void)moec_json_int(moec_json_get(config, "max_position_embeddings"), &r->max_positions);
    r->original = real_or(scaling, "original_max_position_embeddings",
                          real_or(config, "original_max_position_embeddings", (double)r->max_positions));
    r->factor = real_or(scaling, "factor", r->kind == MOEC_ROPE_YARN ? (double)r->max_positions / r->original : 1.0);
    r->low_factor = real_or(scaling, "low_freq_factor", 1.0);
    r->high_factor = real_or(scaling, "high_freq_factor", 4.0);
    r->beta_fast = real_or(scaling, "beta_fast", 32.0);
    r->beta_slow = real_or(scaling, "beta_slow", 1.0);
    r->attention_factor = real_or(scaling, "attention_factor", 0.0);
    r->mscale = real_or(scaling, "mscale", 0.0);
    r->mscale_all = real_or(scaling, "mscale_all_dim", 0.0);
    r->truncate = true;
    (void)moec_json_bool(moec_json_get(scaling, "truncate"), &r->truncate);
    if (!(r->theta > 1.0 && r->theta < 1e30 && r->factor > 0.0 && r->factor < 1e9 && r->original > 0.0 &&
          partial > 0.0 && partial <= 1.0 && r->max_positions > 0 && r->high_factor > r->low_factor &&
          r->low_factor > 0.0 && r->beta_fast > 0.0 && r->beta_slow > 0.0))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: a number is out of range (theta %g, factor %g, original %g, "
                         "partial %g)", r->theta, r->factor, r->original, partial);
    r->width = (int64_t)((double)width * partial);
    if (r->width < 2 || r->width % 2 != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: rotated width %lld is not even", (long long)r->width);
    return MOEC_OK;
}

/* Dimension at which a wave makes `turns` turns over the original length. */
static double yarn_dim(const moec_rope *r, double turns)
{
    return (double)r->width * log(r->original / (turns * 2.0 * pi)) / (2.0 * log(r->theta));
}

static double yarn_mscale(double factor, double m)
{
    return factor <= 1.0 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

/* YaRN (arXiv:2309.00071): slow waves are interpolated, fast ones kept, a ramp between. */
static void yarn_table(double *inv, double *scale, const moec_rope *r)
{
    double lo = yarn_dim(r, r->beta_fast), hi = yarn_dim(r, r->beta_slow);
    if (r->truncate) {
        lo = floor(lo);
        hi = ceil(hi);
    }
    lo = fmax(lo, 0.0);
    hi = fmin(hi, (double)r->width - 1.0);
    if (lo == hi)
        hi += 0.001;
    for (int64_t i = 0; i < r->width / 2; i++) {
        double ramp = fmin(fmax(((double)i - lo) / (hi - lo), 0.0), 1.0);
        inv[i] = inv[i] / r->factor * ramp + inv[i] * (1.0 - ramp);
    }
    if (r->attention_factor > 0.0)
        *scale = r->attention_factor;
    else if (r->mscale != 0.0 && r->mscale_all != 0.0)
        *scale = yarn_mscale(r->factor, r->mscale) / yarn_mscale(r->factor, r->mscale_all);
    else
        *scale = yarn_mscale(r->factor, 1.0);
}

/* Llama 3.1: waves longer than original/low are interpolated, shorter than original/high kept, blended between. */
static void llama3_table(double *inv, const moec_rope *r)
{
    for (int64_t i = 0; i < r->width / 2; i++) {
        double wave = 2.0 * pi / inv[i];
        if (wave > r->original / r->low_factor) {
            inv[i] /= r->factor;
        } else if (wave > r->original / r->high_factor) {
            double t = (r->original / wave - r->low_factor) / (r->high_factor - r->low_factor);
            inv[i] = (1.0 - t) * inv[i] / r->factor + t * inv[i];
        }
    }
}

void moec_rope_table(double *inv_freq, double *scale, const moec_rope *r, int64_t length)
{
    double theta = r->theta, w = (double)r->width;
    if (r->kind == MOEC_ROPE_DYNAMIC && length > r->max_positions && r->width > 2) /* NTK-aware, by length */
        theta *= pow(r->factor * (double)length / (double)r->max_positions - (r->factor - 1.0), w / (w - 2.0));
    for (int64_t i = 0; i < r->width / 2; i++) {
        inv_freq[i] = pow(theta, -2.0 * (double)i / w);
        if (r->kind == MOEC_ROPE_LINEAR)
            inv_freq[i] /= r->factor;
    }
    *scale = 1.0;
    if (r->kind == MOEC_ROPE_YARN)
        yarn_table(inv_freq, scale, r);
    if (r->kind == MOEC_ROPE_LLAMA3)
        llama3_table(inv_freq, r);
}
