/*
 * libmegapipe's own view of a channel. Applications see megapipe.h, policies flush.h.
 */
#ifndef MEGAPIPE_CHANNEL_H
#define MEGAPIPE_CHANNEL_H

#include "megapipe.h"

struct mp_flush_ops;

enum handle_state { HANDLE_FREE, HANDLE_USED, HANDLE_LEAVING };

struct handle {
	enum handle_state state;
	int next_free;		/* while free: the next one, or -1 */
};

struct mp_channel {
	int fd;
	pid_t pid;		/* of the process that made it */
	const struct mp_flush_ops *flush;
	unsigned int threshold;

	struct mp_shared *shared;
	size_t shared_bytes;
	struct mp_request *sq;
	struct mp_completion *cq;
	uint32_t sq_mask;
	uint32_t cq_mask;
	uint32_t sq_tail;	/* this side's own indices */
	uint32_t cq_head;

	/* For the batching lab: what the last crossing left. Plain flushing ignores it. */
	uint32_t left;

	struct handle *handles;
	int nr_handles;		/* allocated */
	int free_handle;	/* head of the list of free ones, or -1 */

	/*
	 * Completions set aside, oldest first, to make room in their ring when
	 * requests cannot go down because it is full.
	 */
	struct mp_completion *aside;
	size_t aside_first, aside_count, aside_size;
};

#endif
