/* See sweep.h. */
#include "sweep.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

double tool_sweep_number(const moec_json *row, const char *key)
{
    double v;
    return moec_json_real(moec_json_get(row, key), &v) ? v : (double)NAN;
}

static moec_status read_budget(tool_budget *out, const char *word, moec_err *err)
{
    char *end;
    *out = (tool_budget){.word = word, .bits = strtod(word, &end)};
    if (*end == '\0')
        return MOEC_OK;
    out->bits = 0.0;
    return moec_within(err, moec_size_parse(&out->bytes, word, err), "--sweep");
}

static void print_table(const moec_json *list, const tool_sweep_form *form)
{
    printf("%10s%s\n", "asked", form->head);
    for (size_t i = 0; i < moec_json_len(list); i++) {
        const moec_json *row = moec_json_at(list, i);
        const char *why = moec_json_string(moec_json_get(row, "error"));
        printf("%10s", moec_json_string(moec_json_get(row, "asked")));
        if (why)
            printf(" not possible: %s\n", why);
        else
            form->print(row);
    }
    printf("%s", form->foot);
}

moec_status tool_sweep(const char *budgets, const tool_sweep_form *form, bool json, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err why = {MOEC_OK, ""};
    size_t met = 0;
    moec_json *list = moec_json_new_array();
    char *copy = NULL, *rest = NULL;
    MOEC_TRY(moec_copy(&copy, budgets, strlen(budgets), err));
    for (char *word = strtok_r(copy, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        tool_budget b;
        MOEC_TRY(read_budget(&b, word, err));
        why = (moec_err){MOEC_OK, ""};
        moec_json *row = moec_json_new_object();
        moec_json_push(list, row);
        moec_json_set(row, "asked", moec_json_new_string(word));
        const moec_status filled = form->fill(row, form->ctx, &b, &why);
        met += filled == MOEC_OK;
        if (filled == MOEC_ENOFIT)
            moec_json_set(row, "error", moec_json_new_string(why.text));
        else if (filled != MOEC_OK)
            MOEC_TRY(moec_fail(err, filled, "%s", why.text));
    }
    if (met == 0 && why.code != MOEC_OK)
        MOEC_TRY(moec_fail(err, why.code, "%s", why.text));
    if (json) {
        st = tool_print_json(list, err);
        list = NULL;
    } else {
        print_table(list, form);
    }
done:
    moec_json_free(list);
    moec_free(copy);
    return st;
}
