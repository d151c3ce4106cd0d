/* SPDX-License-Identifier: MIT */
#include "ep/team.h"

#include "base/error.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

struct member {
    pthread_t thread;
    epi_team *team;
    int part;
};

struct epi_team {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    int helpers;
    uint64_t round; /* raised once per run */
    int working;    /* helpers that have not finished the round */
    bool stop;
    epi_team_fn fn;
    void *context;
    struct member member[];
};

static void *helper_main(void *argument)
{
    struct member *self = argument;
    epi_team *team = self->team;
    uint64_t round = 0;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (team->round == round && !team->stop)
            pthread_cond_wait(&team->start, &team->lock);
        if (team->stop)
            break;
        round = team->round;
        pthread_mutex_unlock(&team->lock);
        team->fn(team->context, self->part, team->helpers + 1);
        pthread_mutex_lock(&team->lock);
        if (--team->working == 0)
            pthread_cond_signal(&team->done);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

ep_status epi_team_create(int helpers, epi_team **out)
{
    *out = NULL;
    epi_team *team = calloc(1, sizeof *team + (size_t)helpers * sizeof team->member[0]);
    if (!team)
        return epi_fail(EP_ERR_MEMORY, "out of memory for %d helper threads", helpers);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->start, NULL);
    pthread_cond_init(&team->done, NULL);
    for (int i = 0; i < helpers; i++) {
        team->member[i].team = team;
        team->member[i].part = i + 1;
        if (pthread_create(&team->member[i].thread, NULL, helper_main, &team->member[i])) {
            epi_team_destroy(team);
            return epi_fail(EP_ERR_SYSTEM, "could not start helper thread %d of %d", i, helpers);
        }
        team->helpers++;
    }
    *out = team;
    return EP_OK;
}

void epi_team_destroy(epi_team *team)
{
    if (!team)
        return;
    pthread_mutex_lock(&team->lock);
    team->stop = true;
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->lock);
    for (int i = 0; i < team->helpers; i++)
        pthread_join(team->member[i].thread, NULL);
    pthread_cond_destroy(&team->start);
    pthread_cond_destroy(&team->done);
    pthread_mutex_destroy(&team->lock);
    free(team);
}

int epi_team_parts(const epi_team *team)
{
    return team ? team->helpers + 1 : 1;
}

void epi_team_run(epi_team *team, epi_team_fn fn, void *context)
{
    int parts = epi_team_parts(team);
    if (parts == 1) {
        fn(context, 0, 1);
        return;
    }
    pthread_mutex_lock(&team->lock);
    team->fn = fn;
    team->context = context;
    team->working = team->helpers;
    team->round++;
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->lock);
    fn(context, 0, parts);
    pthread_mutex_lock(&team->lock);
    while (team->working)
        pthread_cond_wait(&team->done, &team->lock);
    pthread_mutex_unlock(&team->lock);
}
