/*
 * A channel with files of every kind, and everything that a program can do to it
 * at random: what the fuzzer and the attacks have in common.
 */
#ifndef ARENA_H
#define ARENA_H

#include <stdatomic.h>

#include "test.h"

/* What requests act on. Its handles are 0 .. ENDS - 1, with gaps. */
enum { ENDS = 24, ARENA_MEMORY = 1 << 16 };
#define ARENA_ADDRESS 0x100000000000UL

struct arena {
	struct raw r;
	int ends[ENDS];
	int peers[ENDS];	/* the other side, or -1 */
	char *memory;		/* requests may do to it what they like */
	uint32_t sq_head;	/* the kernel's: known from what crossings return */
	uint32_t cq_head;	/* one that the kernel has accepted */
	unsigned long refused, done;	/* crossings, requests */
	uint64_t seed;		/* where the scribblers' own come from */
	atomic_bool over;
};

/* Descriptors that the kernel makes come after all of ours. Once per process. */
void reserve_descriptors(void);

/* @flags: MP_PARTITION, MP_LWSOCKET. */
void arena_make(struct arena *a, unsigned int flags);
void arena_end(struct arena *a);

/* Fill the ring of requests. */
void arena_requests(struct arena *a, uint64_t *seed);
/* Cross, with indices that the kernel accepts unless somebody overwrites them. */
void arena_cross(struct arena *a, uint64_t *seed);
/* Let the peers do something, too. */
void arena_stir(struct arena *a, uint64_t *seed);
/* A thread that writes into the rings, and rarely over the indices, until ->over. */
void *arena_scribble(void *argument);

#endif
