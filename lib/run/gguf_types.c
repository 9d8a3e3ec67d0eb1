/* See gguf_types.h. */
#include "run/gguf_types.h"

#include "base/mem.h"
#include "base/opt.h"
#include "base/word.h"
#include "num/lp.h"

#include <ctype.h>
#include <math.h>
#include <regex.h>
#include <stdio.h>
#include <string.h>

enum { ALIGN = MOEC_GGUF_ALIGNMENT, OPTIONS = MOEC_BLOCK_COUNT + 1 };
static const moec_block NO_TYPE = MOEC_BLOCK_COUNT;
static const double solve_seconds = 0.0; /* no limit, lest the choice depend on the load of the machine */

/* --- what is written by hand ----------------------------------------------------------------------------------------- */

/* The type that text[0, n) names. */
static moec_status read_type(moec_block *out, const char *text, size_t n, moec_err *err)
{
    const char *names[MOEC_BLOCK_COUNT];
    char word[32] = "";
    for (size_t i = 0; i < n && i < sizeof word - 1; i++)
        word[i] = (char)tolower((unsigned char)text[i]);
    *out = n < sizeof word ? moec_blocks_find(word) : NO_TYPE;
    if (*out != NO_TYPE)
        return MOEC_OK;
    for (int i = 0; i < MOEC_BLOCK_COUNT; i++)
        names[i] = moec_blocks[i].name;
    const char *near = moec_word_nearest(word, names, MOEC_BLOCK_COUNT);
    return moec_fail(err, MOEC_EINVAL, "no type '%s'%s%s; --formats lists them", word, near ? "; did you mean " : "", near ? near : "");
}

/* Length of the entry at the front: up to a comma that is in no brackets. */
static size_t entry_length(const char *text)
{
    int depth = 0;
    size_t n = 0;
    for (; text[n] && (text[n] != ',' || depth > 0); n++) {
        depth += text[n] == '[' || text[n] == '{';
        depth -= (text[n] == ']' || text[n] == '}') && depth > 0;
    }
    return n;
}

static moec_status read_rule(moec_gguf_rules_list *out, size_t *cap, const char *text, size_t n, bool first, moec_err *err)
{
    moec_status st = MOEC_OK;
    regex_t re;
    size_t cut = n;
    while (cut > 0 && text[cut - 1] != '=')
        cut--;
    if (n == 0 || cut == n || cut == 1)
        return moec_fail(err, MOEC_EINVAL, "--types: an empty entry; as in q4_k,ffn_down_exps=q6_k");
    if (cut == 0 && !first)
        return moec_fail(err, MOEC_EINVAL, "--types %.*s: a type for all stands first, others behind a pattern: PATTERN=TYPE", (int)n, text);
    if (cut == 0) {
        out->all = true;
        return moec_within(err, read_type(&out->usual, text, n, err), "--types");
    }
    MOEC_TRY(MOEC_GROW(out->at, *cap, out->n + 1, err));
    moec_gguf_rule *r = &out->at[out->n];
    *r = (moec_gguf_rule){.pattern = NULL};
    MOEC_TRY(moec_within(err, read_type(&r->type, text + cut, n - cut, err), "--types"));
    MOEC_TRY(moec_copy(&r->pattern, text, cut - 1, err));
    out->n++;
    const int bad = regcomp(&re, r->pattern, REG_EXTENDED | REG_NOSUB);
    if (bad != 0) {
        char why[100] = "";
        regerror(bad, &re, why, sizeof why);
        return moec_fail(err, MOEC_EINVAL, "--types %s: no regular expression: %s", r->pattern, why);
    }
    regfree(&re);
done:
    return st;
}

moec_status moec_gguf_rules_read(moec_gguf_rules_list *out, const char *text, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t cap = 0;
    *out = (moec_gguf_rules_list){.at = NULL};
    for (const char *at = text;;) {
        const size_t n = entry_length(at);
        MOEC_TRY(read_rule(out, &cap, at, n, at == text, err));
        if (at[n] == '\0')
            break;
        at += n + 1;
    }
done:
    if (st != MOEC_OK)
        moec_gguf_rules_release(out);
    return st;
}

void moec_gguf_rules_release(moec_gguf_rules_list *r)
{
    for (size_t i = 0; i < r->n; i++)
        moec_free(r->at[i].pattern);
    moec_free(r->at);
    *r = (moec_gguf_rules_list){.at = NULL};
}

moec_status moec_gguf_candidates_read(uint32_t *out, const char *text, moec_err *err)
{
    *out = 0;
    for (const char *at = text;;) {
        const size_t n = strcspn(at, ",");
        moec_block b;
        moec_status st = moec_within(err, read_type(&b, at, n, err), "--candidates");
        if (st != MOEC_OK)
            return st;
        *out |= UINT32_C(1) << b;
        if (at[n] == '\0')
            return MOEC_OK;
        at += n + 1;
    }
}

/* --- the choice ------------------------------------------------------------------------------------------------------ */

/* What a tensor may be. NO_TYPE: it keeps its MXFP4 codes. */
typedef struct options {
    moec_block type[OPTIONS];
    int64_t bytes[OPTIONS];
    double cost[OPTIONS];
    int n;
} options;

typedef struct choice {
    const moec_gguf_model *x;
    const moec_gguf_types_request *r;
    moec_gguf_types *out;
    options *of;     /* [n], n 0: no matrix, or the second of a pair */
    size_t *second;  /* [n] the other of a pair, 0: none */
    double *values;  /* [n] */
    int64_t *plain;  /* [n] bytes of what is no matrix, and at F16 of what is */
    uint32_t set;    /* candidates */
} choice;

static int64_t padded(int64_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

static int64_t rows_of(const moec_gguf_tensor *t)
{
    return t->dim[1] * t->dim[2] * t->dim[3];
}

/* Bytes of a tensor whose rows take the type; NO_TYPE: MXFP4 codes. */
static int64_t bytes_of(const moec_gguf_tensor *t, moec_block type)
{
    return padded(moec_blocks_bytes(type == NO_TYPE ? MOEC_BLOCK_MXFP4 : type, t->dim[0]) * rows_of(t));
}

static void add_option(options *o, moec_block type, int64_t bytes, double cost)
{
    for (int i = 0; i < o->n; i++)
        if (o->type[i] == type)
            return;
    o->type[o->n] = type;
    o->bytes[o->n] = bytes;
    o->cost[o->n++] = cost;
}

/* What there is on average for a value of the matrices. */
static double mean_bits(const choice *c)
{
    const moec_gguf_types_request *r = c->r;
    double values = 0.0, rest = (double)r->fixed;
    for (size_t i = 0; i < c->out->n; i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(c->x, i);
        const bool matrix = moec_gguf_model_matrix(c->x, i);
        values += matrix ? (double)t->dim[0] * (double)rows_of(t) : 0.0;
        rest += matrix ? 0.0 : (double)padded(t->dim[0] * rows_of(t) * 4);
    }
    return r->bits > 0 ? r->bits : r->target > 0 && values > 0.0 ? 8.0 * ((double)r->target - rest) / values : (double)INFINITY;
}

static uint32_t usual_candidates(const choice *c)
{
    static const double few = 3.0; /* above, ternary types are hardly ever chosen, and few of llama.cpp's backends have them */
    static const moec_block usual[] = {MOEC_BLOCK_Q2_K, MOEC_BLOCK_Q3_K, MOEC_BLOCK_Q4_K, MOEC_BLOCK_Q5_K, MOEC_BLOCK_Q6_K,
                                       MOEC_BLOCK_Q8_0, MOEC_BLOCK_IQ4_XS, MOEC_BLOCK_IQ4_NL, MOEC_BLOCK_Q4_1, MOEC_BLOCK_Q5_0,
                                       MOEC_BLOCK_Q5_1, MOEC_BLOCK_MXFP4, MOEC_BLOCK_F16};
    uint32_t bits = 0;
    for (size_t i = 0; i < MOEC_COUNT(usual); i++)
        bits |= UINT32_C(1) << usual[i];
    if (mean_bits(c) < few)
        bits |= UINT32_C(1) << MOEC_BLOCK_TQ1_0 | UINT32_C(1) << MOEC_BLOCK_TQ2_0;
    return bits;
}

/* The type that rules give tensor i, or NO_TYPE; *named: by a pattern. */
static moec_block ruled(bool *named, const moec_gguf_rules_list *rules, const regex_t *re, bool *used, const char *name)
{
    moec_block type = rules && rules->all ? rules->usual : NO_TYPE;
    *named = false;
    for (size_t k = 0; rules && k < rules->n; k++)
        if (regexec(&re[k], name, 0, NULL, 0) == 0) {
            type = rules->at[k].type;
            used[k] = *named = true;
        }
    return type;
}

static moec_status fill_options(choice *c, size_t i, moec_block rule, bool named, moec_err *err)
{
    options *o = &c->of[i];
    const moec_gguf_tensor *t = moec_gguf_model_at(c->x, i);
    const bool codes = moec_gguf_model_codes(c->x, i), budget = c->r->bits > 0 || c->r->target > 0;
    const moec_sensitive *s = c->r->sensitivity ? moec_sensitivity_find(c->r->sensitivity, t->name) : NULL;
    const uint32_t set = c->set;
    if (c->r->sensitivity && (!s || s->cols != t->dim[0]))
        return moec_fail(err, MOEC_EINVAL, "the statistics were measured on another model: they have no tensor %s of %lld columns", t->name,
                         (long long)t->dim[0]);
    if (rule != NO_TYPE) {
        const moec_block type = moec_blocks_fall_back(rule, t->dim[0]);
        c->out->asked[i] = rule;
        const bool keep = codes && (type == MOEC_BLOCK_MXFP4 || (!named && bytes_of(t, type) >= bytes_of(t, NO_TYPE)));
        if (keep)
            c->out->asked[i] = NO_TYPE;
        add_option(o, keep ? NO_TYPE : type, bytes_of(t, keep ? NO_TYPE : type), keep ? 0.0 : s ? moec_sensitivity_cost(s, type) : (double)NAN);
        return MOEC_OK;
    }
    if (!budget && !codes)
        return moec_fail(err, MOEC_EINVAL, "%s: no rule of --types names it; begin with a type for all others: --types q4_k,..", t->name);
    if (codes)
        add_option(o, NO_TYPE, bytes_of(t, NO_TYPE), 0.0);
    for (int b = 0; budget && b < MOEC_BLOCK_COUNT; b++) {
        const moec_block type = moec_blocks_fall_back((moec_block)b, t->dim[0]);
        const double cost = !(set >> b & 1) ? (double)NAN : s ? moec_sensitivity_cost(s, type) : 0.0;
        if (!isfinite(cost) || cost < 0.0 || (codes && bytes_of(t, type) >= bytes_of(t, NO_TYPE)))
            continue;
        add_option(o, type, bytes_of(t, type), cost);
    }
    return o->n > 0 ? MOEC_OK : moec_fail(err, MOEC_EINVAL, "%s: no candidate has a measured cost; calibrate --gguf with "
                                          "--gguf-tokens above 0, or name its type in --types", t->name);
}

/* up of the experts whose gate is tensor i, 0: there is none. */
static size_t up_of(const moec_gguf_model *x, size_t i)
{
    const char *name = moec_gguf_model_at(x, i)->name, *at = strstr(name, ".ffn_gate_exps.weight");
    for (size_t k = i + 1; at && k < moec_gguf_model_count(x); k++) {
        const char *other = moec_gguf_model_at(x, k)->name;
        if (strncmp(other, name, (size_t)(at - name)) == 0 && strcmp(other + (at - name), ".ffn_up_exps.weight") == 0)
            return k;
    }
    return 0;
}

/* Joins gate and up where both may choose: options are the same, their rows are as long. */
static void join_pairs(choice *c)
{
    for (size_t i = 0; i < c->out->n; i++) {
        const size_t k = up_of(c->x, i);
        options *a = &c->of[i], *b = &c->of[k];
        bool same = k > 0 && a->n == b->n && c->out->asked[i] == NO_TYPE && c->out->asked[k] == NO_TYPE;
        for (int j = 0; same && j < a->n; j++)
            same = a->type[j] == b->type[j];
        if (!same)
            continue;
        for (int j = 0; j < a->n; j++) {
            a->bytes[j] += b->bytes[j];
            a->cost[j] += b->cost[j];
        }
        b->n = 0;
        c->second[i] = k;
    }
}

static moec_status prepare(choice *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_gguf_rules_list *rules = c->r->rules;
    const size_t n_rules = rules ? rules->n : 0;
    regex_t *re = NULL;
    bool *used = NULL;
    size_t compiled = 0;
    MOEC_TRY(MOEC_NEW(re, n_rules, err));
    MOEC_TRY(MOEC_NEW(used, n_rules, err));
    for (; compiled < n_rules; compiled++)
        if (regcomp(&re[compiled], rules->at[compiled].pattern, REG_EXTENDED | REG_NOSUB) != 0) {
            st = moec_fail(err, MOEC_EINVAL, "--types %s: no regular expression", rules->at[compiled].pattern);
            goto done;
        }
    for (size_t i = 0; i < c->out->n; i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(c->x, i);
        bool named;
        c->out->asked[i] = c->out->type[i] = NO_TYPE;
        c->values[i] = (double)t->dim[0] * (double)rows_of(t);
        if (!moec_gguf_model_matrix(c->x, i)) {
            c->plain[i] = padded(t->dim[0] * rows_of(t) * 4);
            continue;
        }
        c->plain[i] = bytes_of(t, MOEC_BLOCK_F16);
        const moec_block rule = ruled(&named, rules, re, used, t->name);
        MOEC_TRY(fill_options(c, i, rule, named, err));
    }
    for (size_t k = 0; k < n_rules; k++)
        if (!used[k]) {
            st = moec_fail(err, MOEC_EINVAL, "--types %s: matches no tensor that can be quantized; --dry-run lists their names",
                           rules->at[k].pattern);
            goto done;
        }
    if (c->r->pair)
        join_pairs(c);
done:
    while (compiled > 0)
        regfree(&re[--compiled]);
    moec_free(used);
    moec_free(re);
    return st;
}

typedef struct sums {
    int64_t plain, least, half; /* bytes: of what is no matrix; of matrices at their smallest, and at F16 */
    double values;              /* of matrices */
} sums;

static sums sum_up(const choice *c)
{
    sums s = {0};
    for (size_t i = 0; i < c->out->n; i++) {
        const options *o = &c->of[i];
        int64_t least = INT64_MAX;
        if (!moec_gguf_model_matrix(c->x, i)) {
            s.plain += c->plain[i];
            continue;
        }
        s.half += c->plain[i];
        s.values += c->values[i];
        for (int j = 0; j < o->n; j++)
            least = o->bytes[j] < least ? o->bytes[j] : least;
        s.least += o->n > 0 ? least : 0;
    }
    return s;
}

/* Bytes that matrices may take. MOEC_ENOFIT when no choice does, or none is needed. */
static moec_status budget_of(int64_t *out, const choice *c, const sums *s, moec_err *err)
{
    char a[32], b[32];
    const moec_gguf_types_request *r = c->r;
    const uint64_t rest = r->fixed + (uint64_t)s->plain;
    if (r->bits > 0) {
        *out = (int64_t)fmin(floor(r->bits * s->values / 8.0), 0x1p62);
        if (*out < s->least)
            return moec_fail(err, MOEC_ENOFIT, "--bits %g is below the least that these candidates and rules take, %.3f; give more, or "
                             "smaller --candidates", r->bits, 8.0 * (double)s->least / s->values);
        if (*out > s->half)
            return moec_fail(err, MOEC_ENOFIT, "--bits %g is above the model at F16, %.3f; --types f16 writes that", r->bits,
                             8.0 * (double)s->half / s->values);
        return MOEC_OK;
    }
    if (r->target < rest + (uint64_t)s->least)
        return moec_fail(err, MOEC_ENOFIT, "--target-size %llu bytes (%s) is below the least that these candidates and rules take, %llu bytes "
                         "(%s)", (unsigned long long)r->target, moec_size_text(a, sizeof a, r->target),
                         (unsigned long long)(rest + (uint64_t)s->least), moec_size_text(b, sizeof b, rest + (uint64_t)s->least));
    if (r->target > rest + (uint64_t)s->half)
        return moec_fail(err, MOEC_ENOFIT, "--target-size %llu bytes (%s) is above the model at F16, %llu bytes (%s); --types f16 writes that",
                         (unsigned long long)r->target, moec_size_text(a, sizeof a, r->target),
                         (unsigned long long)(rest + (uint64_t)s->half), moec_size_text(b, sizeof b, rest + (uint64_t)s->half));
    *out = (int64_t)(r->target - rest);
    return MOEC_OK;
}

/* pick[i]: option of tensor i. A cost that is not known stands for itself: there is one option. */
static moec_status solve(int64_t *pick, choice *c, int64_t budget, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = c->out->n;
    moec_lp_answer answer = {.pick = NULL};
    int64_t *first = NULL, *size = NULL, groups = 0, all = 0;
    double *cost = NULL;
    MOEC_TRY(MOEC_NEW(first, n + 1, err));
    MOEC_TRY(MOEC_NEW(size, n * OPTIONS, err));
    MOEC_TRY(MOEC_NEW(cost, n * OPTIONS, err));
    for (size_t i = 0; i < n; i++) {
        const options *o = &c->of[i];
        for (int j = 0; j < o->n; j++, all++) {
            size[all] = o->bytes[j];
            cost[all] = isfinite(o->cost[j]) ? o->cost[j] : 0.0;
        }
        if (o->n > 0)
            first[++groups] = all;
    }
    const moec_lp p = {.groups = groups, .first = first, .cost = cost, .size = size, .budget = budget};
    MOEC_TRY(moec_lp_solve(&answer, &p, solve_seconds, err));
    for (size_t i = 0, g = 0; i < n; i++)
        if (c->of[i].n > 0) {
            pick[i] = answer.pick[g] - first[g];
            g++;
        }
    c->out->bound = answer.bound;
    c->out->proven = answer.proven;
done:
    moec_lp_answer_release(&answer);
    moec_free(cost);
    moec_free(size);
    moec_free(first);
    return st;
}

static void take(choice *c, const int64_t *pick, const sums *s)
{
    moec_gguf_types *out = c->out;
    int64_t bytes = 0;
    out->cost = c->r->sensitivity ? 0.0 : (double)NAN;
    for (size_t i = 0; i < out->n; i++) {
        const options *o = &c->of[i];
        if (o->n == 0)
            continue;
        out->type[i] = o->type[pick[i]];
        bytes += o->bytes[pick[i]];
        if (c->second[i] > 0)
            out->type[c->second[i]] = out->type[i];
        if (c->r->sensitivity)
            out->cost += o->cost[pick[i]];
        out->fell_back += out->asked[i] != NO_TYPE && out->asked[i] != out->type[i];
    }
    out->bytes = (uint64_t)(bytes + s->plain);
    out->bits = s->values > 0.0 ? 8.0 * (double)bytes / s->values : 0.0;
}

/* Without `solved` the budget is held against what is possible, and that is all. */
static moec_status choose(moec_gguf_types *out, const moec_gguf_model *x, const moec_gguf_types_request *r, bool solved, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_gguf_model_count(x);
    choice c = {.x = x, .r = r, .out = out};
    int64_t *pick = NULL, budget = 0;
    *out = (moec_gguf_types){.n = n, .bound = (double)NAN};
    if (r->bits > 0 || r->target > 0) {
        if (r->bits > 0 && r->target > 0)
            return moec_fail(err, MOEC_EINVAL, "--bits and --target-size say the same thing; give one");
        if (!r->sensitivity && solved)
            return moec_fail(err, MOEC_EINVAL, "types for a budget are chosen by measured costs, which the statistics do not hold");
    }
    MOEC_TRY(MOEC_NEW(out->type, n, err));
    MOEC_TRY(MOEC_NEW(out->asked, n, err));
    MOEC_TRY(MOEC_NEW(c.of, n, err));
    MOEC_TRY(MOEC_NEW(c.second, n, err));
    MOEC_TRY(MOEC_NEW(c.values, n, err));
    MOEC_TRY(MOEC_NEW(c.plain, n, err));
    MOEC_TRY(MOEC_NEW(pick, n, err));
    c.set = r->candidates ? r->candidates : usual_candidates(&c);
    MOEC_TRY(prepare(&c, err));
    const sums s = sum_up(&c);
    if (r->bits > 0 || r->target > 0) {
        MOEC_TRY(budget_of(&budget, &c, &s, err));
        if (!solved)
            goto done;
        MOEC_TRY(solve(pick, &c, budget, err));
    }
    take(&c, pick, &s);
done:
    moec_free(pick);
    moec_free(c.plain);
    moec_free(c.values);
    moec_free(c.second);
    moec_free(c.of);
    if (st != MOEC_OK)
        moec_gguf_types_release(out);
    return st;
}

moec_status moec_gguf_types_choose(moec_gguf_types *out, const moec_gguf_model *x, const moec_gguf_types_request *r, moec_err *err)
{
    return choose(out, x, r, true, err);
}

moec_status moec_gguf_types_possible(const moec_gguf_model *x, const moec_gguf_types_request *r, moec_err *err)
{
    moec_gguf_types t = {.type = NULL};
    moec_gguf_types_request plain = *r;
    plain.sensitivity = NULL;
    const moec_status st = choose(&t, x, &plain, false, err);
    moec_gguf_types_release(&t);
    return st;
}

void moec_gguf_types_release(moec_gguf_types *t)
{
    moec_free(t->type);
    moec_free(t->asked);
    *t = (moec_gguf_types){.type = NULL};
}

moec_status moec_gguf_types_set(moec_gguf_model *x, const moec_gguf_types *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < t->n; i++) {
        if (!moec_gguf_model_matrix(x, i))
            continue;
        const uint32_t type = t->type[i] == NO_TYPE ? (uint32_t)MOEC_GGML_MXFP4 : (uint32_t)moec_blocks[t->type[i]].ggml;
        MOEC_TRY(moec_gguf_model_set_type(x, i, type, err));
    }
done:
    return st;
}
