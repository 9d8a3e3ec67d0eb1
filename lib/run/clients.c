/* What each client asks of a checkpoint, as rows: a rule, whom it binds, and what to do when it is broken. The binder
 * has already made sure of one count of experts for all layers.
 * Source: loaders of transformers 5.23, vLLM, SGLang and llama.cpp's converter, as far as they differ. What was not
 * tried there says so. */
#include "run/verify.h"

#include "base/file.h"
#include "base/mem.h"
#include "base/word.h"
#include "run/format.h"

#include <fnmatch.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { TRANSFORMERS = 1, VLLM = 2, SGLANG = 4, LLAMA_CPP = 8, ALL = 15, MAX_EXPERTS_LLAMA_CPP = 512, GOOD_MULTIPLE = 8, GOOD_WIDTH = 16 };

static const struct client_row {
    const char *name;
    unsigned bit;
    size_t flag; /* offset of the family's bool */
    const char *good;
} clients[] = {
    {"transformers", TRANSFORMERS, offsetof(moec_family, loads_transformers),
     "one expert count in config.json and in all layers"},
    {"vllm", VLLM, offsetof(moec_family, loads_vllm), "takes the number of experts from config.json (from its source, not run)"},
    {"sglang", SGLANG, offsetof(moec_family, loads_sglang),
     "takes the number of experts from config.json (from its source, not run)"},
    {"llama.cpp", LLAMA_CPP, offsetof(moec_family, loads_llama_cpp),
     "its converter finds every expert tensor of each layer (from its source, not run)"},
};
_Static_assert(sizeof clients / sizeof clients[0] <= MOEC_VERIFY_CLIENTS, "one place per client");

/* A model as it is, or as a plan will leave it. */
typedef struct form {
    const moec_model *m;
    int64_t experts, top_k, groups, top_groups;
    int64_t width; /* neurons of an expert that were thinned out; 0: as in the source */
    int64_t least;           /* fewest experts of a layer; experts where all have as many */
    int64_t router_in;       /* rows of a router's first matrix; 0: it has one matrix only */
    bool factors;            /* in place of experts' matrices */
    bool mapped;             /* rows of the router share experts */
    const char *codes;       /* of few bits in place of experts: the quant_method of config.json; NULL: none */
    bool one_width;          /* all experts of each layer have one, of 4 or 8 bits, and one group size */
    bool fp8, mxfp4, opened; /* opened: a quantized source that is written in a plain type */
} form;

static bool has_file(const moec_model *m, const char *pattern)
{
    char **names;
    size_t n;
    bool found = false;
    if (moec_dir_list(&names, &n, moec_ckpt_dir(m->ckpt), NULL) != MOEC_OK)
        return true; /* out of memory: say nothing against the folder */
    for (size_t i = 0; i < n; i++)
        found = found || fnmatch(pattern, names[i], 0) == 0;
    moec_names_free(names, n);
    return found;
}

/* Widths and group sizes of what is there. */
static void read_codes(form *f, const moec_model *m)
{
    const moec_json *q = moec_json_get(moec_ckpt_config(m->ckpt), "quantization_config");
    if (moec_json_absent(q))
        q = moec_json_get(m->config, "quantization_config");
    f->codes = moec_json_string(moec_json_get(q, "quant_method"));
    f->one_width = true;
    for (int64_t i = 0; i < 3 * m->dims.experts * m->moe_layers; i++) {
        moec_mlp *all = m->layer[m->set[i / (3 * m->dims.experts)].layer].expert;
        const moec_weight *w = moec_mlp_matrix(&all[i % (3 * m->dims.experts) / 3], i % 3), *first = &all[0].gate;
        f->one_width = f->one_width && (w->bits == 4 || w->bits == 8) && w->bits == first->bits && w->block_cols == first->block_cols;
    }
}

/* And of what a plan makes. */
static void plan_codes(form *f, const moec_model *m, const moec_plan *p)
{
    const moec_qformat *q = moec_qformat_find(p->quant.format);
    if (!q || q->dense)
        return;
    const int64_t each = 3 * m->dims.experts;
    f->codes = q->quant_method;
    const int64_t in = moec_qformat_grid(q, &p->quant, m->dims.hidden, 4).group;
    f->one_width = in == moec_qformat_grid(q, &p->quant, m->dims.expert_width, 4).group;
    for (int64_t i = 0; i < each * p->n_layers; i++) {
        const int bits = p->quant.expert[i];
        f->one_width = f->one_width && (bits == 4 || bits == 8) && bits == p->quant.expert[i / each * each];
    }
}

static form form_of(const moec_model *m, const moec_plan *p)
{
    const moec_dims *d = &m->dims;
    form f = {.m = m, .experts = d->experts, .least = d->experts, .top_k = d->top_k, .groups = d->groups, .top_groups = d->top_groups};
    for (int64_t i = 0; i < d->layers; i++)
        if (m->layer[i].expert) {
            f.fp8 = f.fp8 || m->layer[i].expert[0].gate.storage == MOEC_FP8;
            f.router_in = m->layer[i].mat[MOEC_MAT_ROUTER_IN].rows;
            f.mxfp4 = f.mxfp4 || m->layer[i].expert[0].gate.storage == MOEC_MXFP4;
        }
    if (m->packed)
        read_codes(&f, m);
    if (p) {
        if (p->quant.format[0])
            plan_codes(&f, m, p);
        f.experts = p->pad > 0 ? p->pad : moec_plan_most(p);
        f.least = p->pad > 0 ? p->pad : moec_plan_least(p);
        f.top_k = p->new_top_k;
        f.width = p->width;
        f.factors = p->factor.kept;
        f.mapped = p->mapped;
        if (p->mapped) /* the router's; experts are counted by the modelling file */
            f.experts = f.least = d->experts;
        if (p->drop_groups)
            f.groups = f.top_groups = 1;
        f.opened = p->dtype != MOEC_DTYPE_COUNT && (f.fp8 || f.mxfp4);
        if (f.opened)
            f.fp8 = f.mxfp4 = false;
    }
    return f;
}

/* --- rules: true when it holds, else the reason in `why` ------------------------------------------------------------ */

enum { WHY = sizeof(((moec_client *)0)->reason) };
typedef bool rule_fn(char why[WHY], const form *f, const struct client_row *c);

static bool has_class(char why[WHY], const form *f, const struct client_row *c)
{
    snprintf(why, WHY, "%s", c->bit == LLAMA_CPP ? "its converter does not know the family" : "it has no class for the family");
    return *(const bool *)((const char *)f->m->family + c->flag) || (c->bit == TRANSFORMERS && f->m->family->remote_code);
}

static bool has_code(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "needs the model's own Python files (trust_remote_code), which the model's folder lacks");
    return !f->m->family->remote_code || has_file(f->m, "*.py");
}

/* A router's first matrix stays as it is when experts go: any other would change the choice. */
static bool router_fits(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    const int64_t each = f->m->family->router_in_each, counted = f->experts + f->m->family->n_tail;
    snprintf(why, WHY, "the model's own Python files make routers of %lld x %lld hidden units, here are %lld: put that number "
             "where they multiply by %lld", (long long)each, (long long)counted, (long long)f->router_in, (long long)each);
    return each == 0 || f->router_in == 0 || f->router_in == each * counted;
}

static bool top_k_fits(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "top-k %lld is more than the %lld experts: keep more", (long long)f->top_k, (long long)f->experts);
    return f->top_k <= f->experts + f->m->family->n_tail;
}

static bool groups_fit(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    const int64_t least = f->m->family->group == MOEC_GROUP_TOP2 ? 2 : 1;
    const int64_t each = f->groups > 0 ? f->experts / f->groups : f->experts;
    snprintf(why, WHY, "%lld experts do not divide into the router's %lld groups, at least %lld in each and top-k %lld in %lld of "
             "them: another --keep, or --groups drop", (long long)f->experts, (long long)f->groups, (long long)least,
             (long long)f->top_k, (long long)f->top_groups);
    return f->groups <= 1 || (f->experts % f->groups == 0 && each >= least && f->top_k <= f->top_groups * each);
}

static bool count_fits(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "takes at most %d experts, there are %lld: keep fewer", (int)MAX_EXPERTS_LLAMA_CPP,
             (long long)f->experts);
    return f->experts <= MAX_EXPERTS_LLAMA_CPP;
}

static bool one_count(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "layers keep %lld to %lld experts, and config.json has one number for all: --allocation uniform, or --pad-to "
             "where the router allows it", (long long)f->least, (long long)f->experts);
    return f->least == f->experts;
}

static bool has_tokenizer(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "its converter needs the tokenizer's files, which the model's folder lacks");
    return moec_ckpt_gguf(f->m->ckpt) || has_file(f->m, "tokenizer.json") || has_file(f->m, "tokenizer.model") || has_file(f->m, "*.tiktoken") ||
           has_file(f->m, "tiktoken.model");
}

static bool is_folder(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "%s; moecompress convert makes a folder",
             c->bit == TRANSFORMERS ? "gguf_file= misses how wide experts are" : "not looked at as a GGUF");
    return moec_ckpt_gguf(f->m->ckpt) == NULL;
}

static bool reads_factors(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "no code for factored experts, which transformers runs by the Python file beside them; --emit dense loads "
                       "here");
    return !f->factors;
}

static bool reads_map(char why[WHY], const form *f, const struct client_row *c)
{
    (void)c;
    snprintf(why, WHY, "no code for routers whose rows share experts, which transformers runs by the Python file beside them; --emit "
                       "native loads here");
    return !f->mapped;
}

/* What each client does with experts in codes; transformers' part was tried for each family. */
static bool reads_codes(char why[WHY], const form *f, const struct client_row *c)
{
    const moec_family *of = f->m->family;
    if (!f->codes)
        return true;
    if (strcmp(f->codes, "moecompress-nested") == 0) {
        snprintf(why, WHY, "reads no nested codes, whose layout is moecompress's own; --format gptq, compressed-tensors or fake load");
        return false;
    }
    if (c->bit == LLAMA_CPP) {
        snprintf(why, WHY, "its converter reads no packed experts; --format fake loads here");
        return false;
    }
    if (c->bit == TRANSFORMERS) {
        snprintf(why, WHY, "does not load experts of this family in codes of %s, or it was not tried; --format fake loads", f->codes);
        return strcmp(f->codes, "compressed-tensors") == 0 ? of->loads_compressed : of->loads_gptq;
    }
    snprintf(why, WHY, "takes one width of 4 or 8 bits and one group size for all experts of a layer, told as GPTQ's (from its source, "
             "not run): --format gptq-server");
    return f->one_width && strcmp(f->codes, "auto-round") != 0;
}

static const struct rule {
    const char *name;
    unsigned binds;
    rule_fn *holds;
} rules[] = {
    {"folder", TRANSFORMERS | VLLM | SGLANG, is_folder},
    {"class", ALL, has_class},
    {"factors", VLLM | SGLANG | LLAMA_CPP, reads_factors},
    {"map", VLLM | SGLANG | LLAMA_CPP, reads_map},
    {"codes", ALL, reads_codes},
    {"remote-code", TRANSFORMERS, has_code},
    {"router-width", TRANSFORMERS, router_fits},
    {"top-k", ALL, top_k_fits},
    {"one-count", ALL, one_count},
    {"groups", ALL, groups_fit},
    {"expert-count", LLAMA_CPP, count_fits},
    {"tokenizer", LLAMA_CPP, has_tokenizer},
};

/* --- clients --------------------------------------------------------------------------------------------------------- */

/* What does not keep a model from loading, but is worth knowing. */
static void advise(char *out, size_t cap, const form *f, const struct client_row *c)
{
    out[0] = '\0';
    if ((c->bit & (VLLM | SGLANG)) && f->experts % GOOD_MULTIPLE != 0)
        snprintf(out, cap, "a number of experts that is no multiple of %d (%lld): slower kernels, and not every number of devices "
                 "can share them", GOOD_MULTIPLE, (long long)f->experts);
    else if ((c->bit & (VLLM | SGLANG)) && f->width % GOOD_WIDTH != 0)
        snprintf(out, cap, "experts of %lld neurons, no multiple of %d: slower kernels (--align)", (long long)f->width, GOOD_WIDTH);
    else if (c->bit == VLLM && f->opened && f->m->family->activation == MOEC_ACT_SWIGLU_CLAMPED)
        snprintf(out, cap, "experts written in a plain type need a vLLM of June 2026 or later");
}

static void say_good(char why[WHY], const form *f, const struct client_row *c)
{
    const char *storage = f->mxfp4 ? "; MXFP4 blocks as they are" : f->fp8 ? "; FP8 with block scales" : "";
    const bool own = f->factors || f->mapped || f->m->family->remote_code;
    const char *code = c->bit == TRANSFORMERS && own ? "; with trust_remote_code" : "";
    const char *good = f->mapped ? "the Python file beside it leads each row of the router to its expert" : c->good;
    const bool here = c->bit == TRANSFORMERS && f->codes;
    const char *needs = !here                                    ? ""
                        : strcmp(f->codes, "auto-round") == 0    ? "; with auto-round installed"
                        : strcmp(f->codes, "gptq") == 0          ? "; with auto-round and quantization_config=AutoRoundConfig()"
                                                                 : "; with compressed-tensors installed";
    if (moec_ckpt_gguf(f->m->ckpt))
        good = "a GGUF of an architecture that it has";
    snprintf(why, WHY, "%s%s%s%s", good, code, storage, needs);
}

int moec_clients_of(moec_client *out, const moec_model *m, const moec_plan *p)
{
    const form f = form_of(m, p);
    int n = 0;
    for (; n < (int)MOEC_COUNT(clients); n++) {
        const struct client_row *c = &clients[n];
        out[n] = (moec_client){.name = c->name, .loads = true, .rule = ""};
        for (size_t i = 0; i < MOEC_COUNT(rules) && out[n].loads; i++)
            if ((rules[i].binds & c->bit) && !rules[i].holds(out[n].reason, &f, c)) {
                out[n].loads = false;
                out[n].rule = rules[i].name;
            }
        if (out[n].loads) {
            say_good(out[n].reason, &f, c);
            advise(out[n].advice, sizeof out[n].advice, &f, c);
        }
    }
    return n;
}

int moec_clients(moec_client *out, const moec_model *m)
{
    return moec_clients_of(out, m, NULL);
}

/* --- asked for by name ----------------------------------------------------------------------------------------------- */

/* Which clients a list "vllm,llama.cpp" or "all" names. */
static moec_status named(bool wanted[MOEC_VERIFY_CLIENTS], const char *list, moec_err *err)
{
    const char *names[MOEC_COUNT(clients) + 1];
    size_t known = 0;
    for (; known < MOEC_COUNT(clients); known++)
        names[known] = clients[known].name;
    names[known++] = "all";
    for (const char *p = list;; p++) {
        char word[32];
        size_t n = strcspn(p, ","), i = 0;
        snprintf(word, sizeof word, "%.*s", (int)(n < sizeof word ? n : sizeof word - 1), p);
        while (i < known && strcasecmp(names[i], word) != 0)
            i++;
        if (i == known) {
            const char *near = moec_word_nearest(word, names, known);
            return moec_fail(err, MOEC_EINVAL, "--compat %s: no such client%s%s; known are transformers, vllm, sglang, llama.cpp "
                             "and all", word, near ? "; did you mean " : "", near ? near : "");
        }
        for (size_t k = 0; k < MOEC_COUNT(clients); k++)
            wanted[k] = wanted[k] || k == i || i == known - 1;
        p += n;
        if (!*p)
            return MOEC_OK;
    }
}

moec_status moec_compat_check(moec_client *out, int *n, const char *list, const moec_model *m, const moec_plan *p,
                              moec_err *err)
{
    bool wanted[MOEC_VERIFY_CLIENTS] = {false};
    moec_client all[MOEC_VERIFY_CLIENTS];
    *n = 0;
    moec_status st = named(wanted, list, err);
    int count = st == MOEC_OK ? moec_clients_of(all, m, p) : 0;
    for (int i = 0; i < count; i++) {
        if (!wanted[i])
            continue;
        if (!all[i].loads)
            return moec_fail(err, MOEC_EFORMAT, "--compat: %s will not load the output (%s): %s", all[i].name, all[i].rule,
                             all[i].reason);
        out[(*n)++] = all[i];
    }
    return st;
}
