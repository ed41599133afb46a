/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the structures inside the module. Lab files see batch.h instead.
 */
#ifndef MEGAPIPE_CHANNEL_H
#define MEGAPIPE_CHANNEL_H

#include <linux/fs.h>
#include <linux/net.h>
#include <linux/nospec.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/socket.h>
#include <linux/spinlock.h>
#include <linux/uio.h>
#include <linux/wait.h>

#include "uapi/megapipe_abi.h"

struct mp_batch_ops;

/*
 * A channel. Everything above @lock is used by the owning thread alone, inside
 * a crossing, and needs no lock: a channel has one thread, a thread makes one
 * crossing at a time, and release() runs when no crossing can be under way.
 */
struct mp_channel {
	/* Set when the channel is made. */
	struct task_struct *owner;	/* reference: the pointer stays unique */
	struct mm_struct *mm;		/* reference, likewise; tells an exec() */
	const struct mp_batch_ops *batch;
	struct page **pages;
	unsigned int nr_pages;
	u32 sq_entries;
	u32 cq_entries;
	struct mp_shared *shared;
	struct mp_request *sq;
	struct mp_completion *cq;

	/* The kernel's own indices; those in @shared are copies for the user. */
	u32 sq_head;			/* next request to take */
	u32 cq_tail;			/* next completion slot to fill */
	/* What the user wrote, read once per crossing and checked. */
	u32 sq_tail;
	u32 cq_head;

	struct mp_handle **handles;	/* by number, NULL where there is none */
	u32 nr_handles;			/* slots; grows as numbers are used */
	u32 nr_registered;		/* slots in use, as many as descriptors at most */

	/*
	 * @lock guards @ready, @nr_ready and, in each handle, @armed, @link and
	 * (while the handle is armed or on the list) @events.
	 * It is taken by wake-up callbacks, under the lock of the socket's
	 * wait queue and with interrupts off; nothing is nested inside it.
	 */
	spinlock_t lock ____cacheline_aligned_in_smp;
	struct list_head ready;
	u32 nr_ready;

	/* For the batching lab: is the owner asleep? Plain mode ignores it. */
	int sleeping;
};

struct mp_write {
	struct iov_iter iter;		/* what is left */
	struct iovec *iov;		/* to be freed, for writev */
	u32 moved;			/* bytes in the send queue so far */
	u8 op;
};

/*
 * A handle: one file in one channel. At most one accept, one read and one
 * write are pending at a time; a second one completes with EBUSY.
 */
struct mp_handle {
	struct mp_channel *channel;
	u32 number;
	u64 cookie;
	struct file *file;		/* reference */
	struct socket *sock;		/* of @file */

	/* Pending operations; the owner's. @pending: EPOLLIN, EPOLLOUT. */
	__poll_t pending;
	u32 accepts;			/* left of an accept; 0: a read is meant */
	u64 read_addr;
	u32 read_len;
	struct mp_write write;

	/* See the channel's @lock. */
	__poll_t armed;			/* events that make the handle ready */
	__poll_t events;		/* events that did */
	struct list_head link;		/* in channel->ready or a batch, or empty */

	/* The callback in the file's wait queue; there while @whead is set. */
	wait_queue_head_t *whead;
	wait_queue_entry_t wait;
};

static inline struct mp_handle *mp_handle_find(const struct mp_channel *ch, u32 number)
{
	if (number >= ch->nr_handles)
		return NULL;
	return ch->handles[array_index_nospec(number, ch->nr_handles)];
}

/* ring.c */
int mp_ring_create(struct mp_channel *ch, struct mp_create *args);
void mp_ring_destroy(struct mp_channel *ch);
int mp_ring_mmap(struct mp_channel *ch, struct vm_area_struct *vma);
int mp_ring_check(struct mp_channel *ch);
void mp_post(struct mp_channel *ch, const struct mp_completion *c);

/* handle.c */
int mp_handle_init(void);
void mp_handle_exit(void);
int mp_handle_add(struct mp_channel *ch, u32 number, struct file *file, u64 cookie);
void mp_handle_remove(struct mp_handle *h);
void mp_handle_remove_all(struct mp_channel *ch);
void mp_handle_wait(struct mp_handle *h, __poll_t events);
void mp_handle_make_ready(struct mp_handle *h, __poll_t events);

/* socket.c */
int mp_socket_register(struct mp_channel *ch, const struct mp_request *req);
int mp_socket_accept(struct mp_handle *h, const struct mp_request *req);
int mp_socket_read(struct mp_handle *h, const struct mp_request *req);
int mp_socket_write(struct mp_handle *h, const struct mp_request *req);
int mp_socket_disconnect(struct mp_handle *h, const struct mp_request *req);
__poll_t mp_socket_events(const struct mp_handle *h, __poll_t events);
void mp_socket_progress(struct mp_handle *h, __poll_t events);
void mp_socket_forget(struct mp_handle *h);

#endif
