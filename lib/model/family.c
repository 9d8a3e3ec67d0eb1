/* The table of families. */
#include "model/family.h"

#include <string.h>

#define MOEC_FAMILY(id) extern const moec_family moec_family_##id;
#include "model/family_table.inc"
#undef MOEC_FAMILY

#define MOEC_FAMILY(id) &moec_family_##id,
static const moec_family *const families[] = {
#include "model/family_table.inc"
};
#undef MOEC_FAMILY

const moec_family *moec_family_at(int i)
{
    return i >= 0 && (size_t)i < MOEC_COUNT(families) ? families[i] : NULL;
}

moec_null_kind moec_family_null(const moec_family *f, int64_t i)
{
    return i < f->n_tail ? f->tail[i] : MOEC_NULL_ZERO;
}

const moec_family *moec_family_find(const char *model_type)
{
    for (size_t i = 0; model_type && i < MOEC_COUNT(families); i++) {
        const moec_family *f = families[i];
        if (strcmp(f->model_type, model_type) == 0)
            return f;
        for (size_t a = 0; a < MOEC_COUNT(f->alias) && f->alias[a]; a++)
            if (strcmp(f->alias[a], model_type) == 0)
                return f;
    }
    return NULL;
}

const moec_family *moec_family_of(const moec_json *config)
{
    const moec_json *text = moec_json_get(config, "text_config");
    for (size_t i = 0; i < MOEC_COUNT(families); i++) {
        const moec_json *mark = families[i]->detect ? moec_json_get(config, families[i]->detect) : NULL;
        if (!moec_json_absent(mark))
            return families[i];
    }
    const moec_family *f = moec_family_find(moec_json_string(moec_json_get(text, "model_type")));
    return f ? f : moec_family_find(moec_json_string(moec_json_get(config, "model_type")));
}
