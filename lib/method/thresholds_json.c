/* The files of thresholds.h. */
#include "method/thresholds.h"

#include "base/mem.h"

#include <math.h>
#include <string.h>

enum { RATIO_BINS = 1024, CUM_BINS = 256 };

static moec_status need(const moec_stats *s, moec_stat kind, const char *who, moec_err *err)
{
    for (int d = 0; d < s->n_domains; d++)
        if (!s->domain[d].data[kind])
            return moec_fail(err, MOEC_EFORMAT, "%s needs the statistic %s, which domain %s does not have", who, moec_stat_kinds[kind].name,
                             s->domain[d].name);
    return MOEC_OK;
}

static moec_status need_two(const moec_stats *s, const char *who, moec_err *err)
{
    return s->meta.top_k == 2 ? MOEC_OK
                              : moec_fail(err, MOEC_EINVAL, "%s is a rule for two experts a token, the model has %lld", who,
                                          (long long)s->meta.top_k);
}

static moec_json *begin(const moec_stats *s, const char *format, const char *source, const char *formula, const char *units)
{
    moec_json *o = moec_json_new_object(), *texts = moec_json_new_array();
    moec_json_set(o, "format", moec_json_new_string(format));
    moec_json_set(o, "version", moec_json_new_int(1));
    moec_json_set(o, "model", moec_json_new_string(s->meta.model));
    moec_json_set(o, "model_type", moec_json_new_string(s->meta.model_type));
    moec_json_set(o, "experts", moec_json_new_int(s->meta.experts));
    moec_json_set(o, "top_k", moec_json_new_int(s->meta.top_k));
    for (int d = 0; d < s->n_domains; d++) {
        moec_json *t = moec_json_new_object();
        moec_json_set(t, "name", moec_json_new_string(s->domain[d].name));
        moec_json_set(t, "tokens", moec_json_new_int((int64_t)s->domain[d].tokens));
        moec_json_set(t, "weight", moec_json_new_real(moec_stats_weight(s, d)));
        moec_json_push(texts, t);
    }
    moec_json_set(o, "texts", texts);
    moec_json_set(o, "source", moec_json_new_string(source));
    moec_json_set(o, "formula", moec_json_new_string(formula));
    moec_json_set(o, "units", moec_json_new_string(units));
    return o;
}

static moec_json *row_of(const moec_stats *s, int64_t l)
{
    moec_json *row = moec_json_new_object();
    moec_json_set(row, "layer", moec_json_new_int(s->meta.moe_layer[l]));
    return row;
}

/* Row `at` of `bins` counts of a histogram's block, over the domains by weight. */
static void mix(double *count, const moec_stats *s, moec_stat kind, int64_t l, int64_t at, int64_t bins)
{
    memset(count, 0, (size_t)bins * sizeof *count);
    for (int d = 0; d < s->n_domains; d++) {
        const uint32_t *block = moec_stat_at(s, d, kind, l);
        for (int64_t b = 0; b < bins; b++)
            count[b] += moec_stats_weight(s, d) * (double)block[at * bins + b];
    }
}

/* --- ODP -------------------------------------------------------------------------------------------------------------- */

moec_status moec_odp_json(moec_json **out, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t each = s->meta.top_k - 1;
    double *beta = NULL;
    *out = NULL;
    if (each < 1)
        return moec_fail(err, MOEC_EINVAL, "odp drops a token's second expert, and the model's tokens have one");
    MOEC_TRY(MOEC_NEW(beta, (size_t)(s->meta.moe_layers * each), err));
    MOEC_TRY(moec_stats_betas(beta, s, err));
    *out = begin(s, "moecompress-odp", "MC-MoE, online dynamic pruning (arXiv:2410.06270), for top-2; other ranks are ours",
                 "median[j-2] = median over tokens of w_j / w_1, w sorted by size; MC-MoE drops expert 2 of a token where w_2 / w_1 is below, "
                 "in prefill, but for the 2 % of tokens of largest |t|_1 times mean attention received", "ratio of applied weights, 0 to 1");
    moec_json *layers = moec_json_new_array();
    for (int64_t l = 0; l < s->meta.moe_layers; l++) {
        moec_json *row = row_of(s, l);
        moec_json_set(row, "median", moec_json_new_reals(beta + l * each, each));
        moec_json_push(layers, row);
    }
    moec_json_set(*out, "layers", layers);
done:
    moec_free(beta);
    return st;
}

/* --- AdapMoE ---------------------------------------------------------------------------------------------------------- */

/* Share of tokens whose w_2 / (w_1 + w_2) is below t: w_2 / w_1 below t / (1 - t). */
static double one_expert(const moec_stats *s, int64_t l, double t)
{
    double count[RATIO_BINS];
    mix(count, s, MOEC_STAT_RATIO_HIST, l, 0, RATIO_BINS);
    return isnan(t) ? (double)NAN : moec_hist_below(count, RATIO_BINS, t >= 0.5 ? 1.0 : t / (1.0 - t));
}

/* Of layer l's selections, those that the router finds from the input of the layer before. */
static double prefetch(const moec_stats *s, int64_t l)
{
    double hits = 0.0, all = 0.0;
    for (int d = 0; l > 0 && d < s->n_domains; d++) {
        const uint64_t *hit = moec_stat_at(s, d, MOEC_STAT_PREFETCH_HIT, l - 1), *selected = moec_stat_at(s, d, MOEC_STAT_SELECTED, l);
        for (int64_t j = 0; hit && j < s->meta.top_k; j++)
            hits += moec_stats_weight(s, d) * (double)hit[j];
        for (int64_t e = 0; hit && e < s->meta.experts; e++)
            all += moec_stats_weight(s, d) * (double)selected[e];
    }
    return all > 0.0 ? hits / all : (double)NAN;
}

typedef struct adapmoe_row {
    double sensitivity, threshold, one, foreseen;
} adapmoe_row;

static moec_status split(int32_t *size, double *loads, const adapmoe_row *row, const moec_stats *s, int64_t cache, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t L = s->meta.moe_layers, E = s->meta.experts;
    double *cost = NULL;
    MOEC_TRY(MOEC_NEW(cost, (size_t)(L * (E + 1)), err));
    for (int64_t l = 0; l < L; l++)
        for (int64_t n = 0; n <= E; n++)
            cost[l * (E + 1) + n] = moec_cache_loads(E, n, isnan(row[l].one) ? 0.0 : row[l].one,
                                                     isnan(row[l].foreseen) ? 0.0 : row[l].foreseen);
    MOEC_TRY(moec_cache_split(size, cost, L, E, cache, err));
    *loads = 0.0;
    for (int64_t l = 0; l < L; l++)
        *loads += cost[l * (E + 1) + size[l]];
done:
    moec_free(cost);
    return st;
}

moec_status moec_adapmoe_json(moec_json **out, const moec_stats *s, const moec_adapmoe_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t L = s->meta.moe_layers;
    adapmoe_row *row = NULL;
    double *sens = NULL, loads = 0.0;
    int32_t *size = NULL;
    *out = NULL;
    MOEC_TRY(need_two(s, "adapmoe", err));
    MOEC_TRY(need(s, MOEC_STAT_RATIO_HIST, "adapmoe", err));
    MOEC_TRY(need(s, MOEC_STAT_SELECTED, "adapmoe", err));
    if (!(o->loss >= 0.0))
        return moec_fail(err, MOEC_EINVAL, "adapmoe: the loss that a skip may cost is a number from 0 up");
    MOEC_TRY(MOEC_NEW(sens, (size_t)L, err));
    MOEC_TRY(MOEC_NEW(row, (size_t)L, err));
    MOEC_TRY(MOEC_NEW(size, (size_t)L, err));
    if (o->sensitivity)
        memcpy(sens, o->sensitivity, (size_t)L * sizeof *sens);
    else
        MOEC_TRY(moec_sensitivities(sens, s, err));
    for (int64_t l = 0; l < L; l++) {
        const double t = sqrt(o->loss / sens[l]);
        row[l] = (adapmoe_row){sens[l], t, one_expert(s, l, t), prefetch(s, l)};
    }
    if (o->cache >= 0)
        MOEC_TRY(split(size, &loads, row, s, o->cache, err));
    *out = begin(s, "moecompress-adapmoe", "AdapMoE (arXiv:2408.10284) and PKU-SEC-Lab/AdapMoE",
                 "threshold = sqrt(loss / sensitivity); a token uses one expert where w_2 / (w_1 + w_2) < threshold; cache sizes of least "
                 "expected loads by dynamic programming over layers", "thresholds are shares of a token's weight; sensitivity: nats a token for "
                 "the whole of it; one_expert, prefetch: shares of tokens, of selections; loads: experts a token");
    moec_json_set(*out, "loss", moec_json_new_real(o->loss));
    moec_json_set(*out, "sensitivities", moec_json_new_string(!o->sensitivity ? "measured: divergence with the layer's experts at 2 bits (--gains), "
                                                                                "for experts' outputs taken as uncorrelated"
                                                              : o->origin ? o->origin : "given"));
    if (o->cache >= 0) {
        moec_json_set(*out, "cache", moec_json_new_int(o->cache));
        moec_json_set(*out, "loads", moec_json_new_real(loads));
    }
    moec_json *layers = moec_json_new_array();
    for (int64_t l = 0; l < L; l++) {
        moec_json *r = row_of(s, l);
        moec_json_set(r, "sensitivity", moec_json_new_real(row[l].sensitivity));
        moec_json_set(r, "threshold", moec_json_new_real(row[l].threshold));
        moec_json_set(r, "one_expert", moec_json_new_real(row[l].one));
        moec_json_set(r, "prefetch", moec_json_new_real(row[l].foreseen));
        if (o->cache >= 0)
            moec_json_set(r, "cache_size", moec_json_new_int(size[l]));
        moec_json_push(layers, r);
    }
    moec_json_set(*out, "layers", layers);
done:
    moec_free(row);
    moec_free(sens);
    moec_free(size);
    return st;
}

/* --- HOBBIT ----------------------------------------------------------------------------------------------------------- */

/* What stands before the second choice and behind, over layers [lo, hi); *first: how many first choices, before which nothing does. */
static void before_choices(double *count, double *first, const moec_stats *s, int64_t lo, int64_t hi)
{
    double one[CUM_BINS];
    memset(count, 0, CUM_BINS * sizeof *count);
    *first = 0.0;
    for (int64_t l = lo; l < hi; l++)
        for (int64_t j = 0; j < s->meta.top_k; j++) {
            mix(one, s, MOEC_STAT_CUMGATE_HIST, l, j, CUM_BINS);
            for (int64_t b = 0; b < CUM_BINS; b++)
                *(j == 0 ? first : &count[b]) += one[b];
        }
}

/* Share of all choices with s <= t. */
static double up_to(const double *count, double first, double t)
{
    const double rest = moec_hist_total(count, CUM_BINS);
    return first + rest > 0.0 ? (first + (rest > 0.0 ? rest * moec_hist_below(count, CUM_BINS, t) : 0.0)) / (first + rest) : (double)NAN;
}

/* The least t with that share. */
static double t_of(const double *count, double first, double share)
{
    const double rest = moec_hist_total(count, CUM_BINS), want = share * (first + rest) - first;
    if (!(rest > 0.0))
        return first > 0.0 ? 0.0 : (double)NAN;
    return want <= 0.0 ? 0.0 : moec_hist_quantile(count, CUM_BINS, want < rest ? want / rest : 1.0);
}

static void put_classes(moec_json *o, const double *count, double first, double t1, double t2)
{
    const double high = up_to(count, first, t1), most = up_to(count, first, t2);
    moec_json_set(o, "high", moec_json_new_real(high));
    moec_json_set(o, "low", moec_json_new_real(most - high));
    moec_json_set(o, "skip", moec_json_new_real(1.0 - most));
}

moec_status moec_hobbit_json(moec_json **out, const moec_stats *s, const moec_hobbit_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    double count[CUM_BINS], first, t1 = o->t1, t2 = o->t2;
    const bool given = !isnan(o->t1) && !isnan(o->t2);
    *out = NULL;
    MOEC_TRY(need(s, MOEC_STAT_CUMGATE_HIST, "hobbit", err));
    if (!given && !(o->high >= 0.0 && o->low >= 0.0 && o->high + o->low <= 1.0 + 1e-12))
        return moec_fail(err, MOEC_EINVAL, "hobbit: shares %g of high and %g of low copies: 0 to 1, together at most 1", o->high, o->low);
    before_choices(count, &first, s, 0, s->meta.moe_layers);
    if (!given) {
        t1 = t_of(count, first, o->high);
        t2 = t_of(count, first, o->high + o->low);
    }
    if (given && !(t1 >= 0.0 && t1 <= t2 && t2 <= 1.0))
        return moec_fail(err, MOEC_EINVAL, "hobbit: thresholds %g and %g: 0 <= T1 <= T2 <= 1", t1, t2);
    *out = begin(s, "moecompress-hobbit", "HOBBIT (arXiv:2411.01433)",
                 "s_j = share of a token's weight before its j-th expert by weight, s_1 = 0; high copy where s <= t1, low where s <= t2, else "
                 "skipped", "t1, t2: shares of a token's weight; high, low, skip: shares of selections");
    moec_json_set(*out, "t1", moec_json_new_real(t1));
    moec_json_set(*out, "t2", moec_json_new_real(t2));
    moec_json_set(*out, "by", moec_json_new_string(given ? "thresholds" : "shares"));
    moec_json *all = moec_json_new_object(), *layers = moec_json_new_array();
    put_classes(all, count, first, t1, t2);
    moec_json_set(*out, "overall", all);
    for (int64_t l = 0; l < s->meta.moe_layers; l++) {
        moec_json *row = row_of(s, l);
        before_choices(count, &first, s, l, l + 1);
        put_classes(row, count, first, t1, t2);
        moec_json_push(layers, row);
    }
    moec_json_set(*out, "layers", layers);
done:
    return st;
}

/* --- PreMoe ----------------------------------------------------------------------------------------------------------- */

/* The expert of the largest score that is not taken yet; the lowest on ties. */
static int32_t best_of(const double *score, const bool *taken, int64_t E)
{
    int32_t best = -1;
    for (int32_t e = 0; e < E; e++)
        if (!taken[e] && (best < 0 || score[e] > score[best]))
            best = e;
    return best;
}

static moec_status premoe_layer(moec_json *layers, const moec_stats *s, int d, int64_t l, int64_t keep, moec_err *err)
{
    moec_status st = MOEC_OK;
    const double *score = moec_stat_at(s, d, MOEC_STAT_MARKER_TOP1, l);
    bool *taken = NULL;
    moec_json *experts = moec_json_new_array(), *scores = moec_json_new_array(), *row = row_of(s, l);
    const double tokens = (double)s->domain[d].tokens;
    MOEC_TRY(MOEC_NEW(taken, (size_t)s->meta.experts, err));
    for (int64_t i = 0; i < keep; i++) {
        const int32_t e = best_of(score, taken, s->meta.experts);
        taken[e] = true;
        moec_json_push(experts, moec_json_new_int(e));
        moec_json_push(scores, moec_json_new_real(tokens > 0.0 ? score[e] / tokens : (double)NAN));
    }
done:
    moec_json_set(row, "experts", experts);
    moec_json_set(row, "score", scores);
    moec_json_push(layers, row);
    moec_free(taken);
    return st;
}

moec_status moec_premoe_json(moec_json **out, const moec_stats *s, int64_t keep, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *o = NULL, *domains = NULL;
    *out = NULL;
    MOEC_TRY(need(s, MOEC_STAT_MARKER_TOP1, "premoe", err));
    if (keep < s->meta.top_k || keep > s->meta.experts)
        return moec_fail(err, MOEC_EINVAL, "premoe: %lld experts a layer: %lld (top-k) to %lld are possible", (long long)keep,
                         (long long)s->meta.top_k, (long long)s->meta.experts);
    o = begin(s, "moecompress-premoe", "PreMoe (arXiv:2505.17639), TCESS of JarvisPei/PreMoe with Ka = 1",
              "TCESS[l,e] = sum of the raw router logit z_e over the tokens where e has the largest / tokens; the largest first, the lowest "
              "number on ties", "experts: numbers in the layer; score: logits");
    moec_json_set(o, "keep", moec_json_new_int(keep));
    domains = moec_json_new_array();
    for (int d = 0; st == MOEC_OK && d < s->n_domains; d++) {
        moec_json *one = moec_json_new_object(), *layers = moec_json_new_array();
        moec_json_set(one, "name", moec_json_new_string(s->domain[d].name));
        moec_json_set(one, "tokens", moec_json_new_int((int64_t)s->domain[d].tokens));
        for (int64_t l = 0; st == MOEC_OK && l < s->meta.moe_layers; l++)
            st = premoe_layer(layers, s, d, l, keep, err);
        moec_json_set(one, "layers", layers);
        moec_json_push(domains, one);
    }
    moec_json_set(o, "domains", domains);
    if (st == MOEC_OK)
        *out = o;
    else
        moec_json_free(o);
done:
    return st;
}
