/* SPDX-License-Identifier: MIT */
/* The verdict on room that every rank comes to for every rank, on a device as here. */
#include "ep/cuda/shared.h"
#include "support/random.h"
#include "support/test.h"

#include <stdbool.h>
#include <string.h>

/* Takes a block of the smallest piece that holds it, as the window does. */
static bool take(int64_t *pieces, int64_t bytes)
{
    int best = -1;
    for (int i = 0; i < EPC_PIECES; i++)
        if (pieces[i] >= bytes && (best < 0 || pieces[i] < pieces[best]))
            best = i;
    if (best < 0)
        return false;
    pieces[best] -= bytes;
    return true;
}

/* Whether region and all that may follow can be taken, in the order given. */
static bool can_take(const int64_t *pieces, int64_t end, const int64_t *follow, const int *order)
{
    int64_t left[EPC_PIECES];
    memcpy(left, pieces, sizeof left);
    left[0] -= end;
    bool ok = left[0] >= 0;
    for (int i = 0; i < EPC_FOLLOWERS; i++)
        ok = ok && take(left, follow[order[i]]);
    return ok;
}

static void one_piece(void **state)
{
    (void)state;
    enum { ROWS = 100, SPARE = 1000, END = 70000 };
    int64_t all = END + EPC_FOLLOWERS * epc_follower_bytes(END, ROWS, SPARE);
    int64_t pieces[EPC_PIECES] = {all};
    assert_true(epc_has_room(pieces, END, ROWS, SPARE));
    pieces[0]--;
    assert_false(epc_has_room(pieces, END, ROWS, SPARE));
    pieces[0] = END; /* nothing is to follow */
    assert_true(epc_has_room(pieces, END, ROWS, 0));
    pieces[0]--;
    assert_false(epc_has_room(pieces, END, ROWS, 0));
    pieces[0] = 0;
    assert_true(epc_has_room(pieces, 0, 0, SPARE)); /* no rows need nothing */
}

/* The region has its own piece; the others count for what follows alone. */
static void several_pieces(void **state)
{
    (void)state;
    enum { ROWS = 64, SPARE = 4096, END = 200000 };
    int64_t follow = epc_follower_bytes(END, ROWS, SPARE);
    int64_t enough[EPC_PIECES] = {END + follow, follow, follow, END};
    int64_t apart[EPC_PIECES] = {END, follow, follow, follow};
    int64_t small[EPC_PIECES] = {END, follow, follow, follow - 1};
    int64_t wrong[EPC_PIECES] = {END - 1, 4 * follow, 4 * follow, 4 * follow};
    assert_true(epc_has_room(enough, END, ROWS, SPARE));
    assert_true(epc_has_room(apart, END, ROWS, SPARE));
    assert_false(epc_has_room(small, END, ROWS, SPARE));
    assert_false(epc_has_room(wrong, END, ROWS, SPARE));
}

/* A promise of room is kept whatever is asked for first. */
static void promises_hold(void **state)
{
    (void)state;
    static const int orders[3][3] = {{0, 1, 2}, {0, 2, 1}, {2, 0, 1}};
    struct rng rng;
    int promised = 0;
    rng_seed(&rng, rng_env_seed(1));
    for (int i = 0; i < 200000; i++) {
        int64_t rows = rng_range(&rng, 1, 50), spare = rng_range(&rng, 1, 64);
        int64_t end = rng_range(&rng, 1, 4000), pieces[EPC_PIECES];
        pieces[0] = rng_range(&rng, 0, 16000);
        for (int n = 1; n < EPC_PIECES; n++)
            pieces[n] = rng_range(&rng, 0, pieces[n - 1]);
        if (!epc_has_room(pieces, end, rows, spare))
            continue;
        promised++;
        int64_t copy = epc_round(rows * spare) + 2 * EPC_ALIGN, follow[] = {copy, copy, end};
        for (int n = 0; n < 3; n++)
            assert_true(can_take(pieces, end, follow, orders[n]));
    }
    assert_true(promised > 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_piece),
        cmocka_unit_test(several_pieces),
        cmocka_unit_test(promises_hold),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
