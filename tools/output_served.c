/* See output_served.h. */
#include "output_served.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

enum { ROWS = 16, NAME = 25 };

/* "  12.3 %", or "-" where nothing is known. */
static void print_share(double share)
{
    if (isnan(share))
        printf(" %9s", "-");
    else
        printf(" %7.2f %%", 100.0 * share);
}

static const char *short_name(char text[NAME], const moec_stats *s, int domain)
{
    snprintf(text, NAME, "%s", s->domain[domain].name);
    moec_plain_line(text);
    return text;
}

/* One line of a table that shows the largest losses first. */
typedef struct row {
    double lost;
    int64_t at; /* layer, or domain */
} row;

static int by_loss(const void *a, const void *b)
{
    const row *x = a, *y = b;
    if (x->lost != y->lost)
        return x->lost > y->lost ? -1 : 1;
    return x->at < y->at ? -1 : x->at > y->at;
}

/* The domain that loses the largest share of a layer's selections. */
static int most_affected(const moec_served *v, int64_t layer)
{
    const moec_share *lost = v->layer_lost + layer * v->domains;
    int most = 0;
    for (int d = 1; d < v->domains; d++)
        if (lost[d].selected > lost[most].selected || isnan(lost[most].selected))
            most = d;
    return most;
}

static double known(double share)
{
    return isnan(share) ? -1.0 : share;
}

/* Of a layer's removed experts the one that the domain used most; n: none was used. */
static int64_t busiest(const moec_served *v, int64_t layer, int domain)
{
    int64_t best = v->n;
    double most = 0.0;
    for (int64_t i = 0; i < v->n; i++)
        if (v->expert[i].set == layer && v->share[i * v->domains + domain].selected > most) {
            most = v->share[i * v->domains + domain].selected;
            best = i;
        }
    return best;
}

static void print_layers(const moec_served *v, const moec_plan *p, const moec_stats *s, row *rows)
{
    char name[NAME];
    for (int64_t l = 0; l < v->layers; l++)
        rows[l] = (row){known(v->layer_lost[l * v->domains + most_affected(v, l)].selected), l};
    qsort(rows, (size_t)v->layers, sizeof *rows, by_loss);
    printf("\nwhat the removed experts served\n%5s  %-24s %9s %9s  %s\n", "layer", "most affected text", "selected", "gate",
           "its busiest removed expert");
    for (int64_t i = 0; i < v->layers && i < ROWS; i++) {
        const int64_t l = rows[i].at;
        const int d = most_affected(v, l);
        const moec_share *lost = &v->layer_lost[l * v->domains + d];
        const int64_t e = busiest(v, l, d);
        printf("%5" PRId64 "  %-24s", p->layer[l].layer, short_name(name, s, d));
        print_share(lost->selected);
        print_share(lost->gate);
        if (e < v->n)
            printf("  %d (%.2f %%)", (int)v->expert[e].expert, 100.0 * v->share[e * v->domains + d].selected);
        printf("\n");
    }
    if (v->layers > ROWS)
        printf("%5s  and %" PRId64 " layers that lose less\n", "", v->layers - ROWS);
}

static void print_texts(const moec_served *v, const moec_stats *s, row *rows)
{
    char name[NAME];
    for (int d = 0; d < v->domains; d++)
        rows[d] = (row){known(v->lost[d].selected), d};
    qsort(rows, (size_t)v->domains, sizeof *rows, by_loss);
    printf("%5s\n", "all");
    for (int i = 0; i < v->domains && i < ROWS; i++) {
        printf("%5s  %-24s", "", short_name(name, s, (int)rows[i].at));
        print_share(v->lost[rows[i].at].selected);
        print_share(v->lost[rows[i].at].gate);
        printf("\n");
    }
    if (v->domains > ROWS)
        printf("%5s  and %d texts that lose less\n", "", v->domains - ROWS);
    printf("\nselected, gate: share of a text's selections and of its applied weights that goes to the removed experts;\n"
           "--json has it for each of the %" PRId64 "\n", v->n);
}

moec_status tool_print_served(const moec_plan *p, const moec_stats *s, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_served v = {0};
    row *rows = NULL;
    MOEC_TRY(moec_served_by(&v, p, s, err));
    if (v.n == 0 || v.domains == 0)
        goto done;
    MOEC_TRY(MOEC_NEW(rows, (size_t)(v.layers > v.domains ? v.layers : v.domains), err));
    print_layers(&v, p, s, rows);
    print_texts(&v, s, rows);
done:
    moec_free(rows);
    moec_served_release(&v);
    return st;
}

static moec_json *shares_json(const moec_share *share, const moec_stats *s)
{
    moec_json *o = moec_json_new_object();
    for (int d = 0; d < s->n_domains; d++) {
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "selected", moec_json_new_real(share[d].selected));
        moec_json_set(one, "gate", moec_json_new_real(share[d].gate));
        moec_json_set(o, s->domain[d].name, one);
    }
    return o;
}

moec_status tool_set_served(moec_json *o, const moec_plan *p, const moec_stats *s, moec_err *err)
{
    moec_served v;
    moec_status st = moec_served_by(&v, p, s, err);
    if (st != MOEC_OK)
        return st;
    moec_json *list = moec_json_new_array();
    for (int64_t i = 0; i < v.n; i++) {
        const moec_served_expert *e = &v.expert[i];
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "layer", moec_json_new_int(p->layer[e->set].layer));
        moec_json_set(one, "expert", moec_json_new_int(e->expert));
        moec_json_set(one, "most", e->most < 0 ? moec_json_new_null() : moec_json_new_string(s->domain[e->most].name));
        moec_json_set(one, "domains", shares_json(v.share + i * v.domains, s));
        moec_json_push(list, one);
    }
    moec_json_set(o, "served", list);
    moec_json_set(o, "lost_by_domain", shares_json(v.lost, s));
    moec_served_release(&v);
    return MOEC_OK;
}
