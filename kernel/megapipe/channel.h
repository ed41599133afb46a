/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the structures inside the module. Lab files need of it what batch.h,
 * partition.h and lwsocket.h speak of.
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
#include <net/inet_connection_sock.h>

#include "uapi/megapipe_abi.h"

struct mp_batch_ops;
struct mp_partition_ops;
struct mp_lwsocket_ops;
struct mp_kind;
struct mp_job;

/* A place for an lwsocket between its accept and its registration. */
struct mp_lw_slot {
	struct socket *sock;		/* NULL: free */
	u32 next_free;			/* while free: index, or MP_NO_SLOT */
};

#define MP_NO_SLOT	U32_MAX

/*
 * How many removed handles, lwsockets, and charges a channel keeps. To allocate,
 * charge and free one costs several times what it costs to use it again.
 */
#define MP_MAX_SPARE	128

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
	const struct mp_partition_ops *partition;
	const struct mp_lwsocket_ops *lwsocket;		/* NULL: descriptors only */
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

	struct mp_lw_slot *lw_slots;	/* by number - MP_LWSOCKET_BASE */
	u32 nr_lw_slots;
	u32 lw_free;			/* head of the list of free ones */

	/* Handles and waiting lwsockets; as many as descriptors at most. */
	u32 nr_held;

	/* Handles that were removed and not freed, for the next connections. */
	struct mp_handle *spare[MP_MAX_SPARE];
	u32 nr_spare;
	/* Memory of lwsockets likewise. */
	struct socket *spare_lw[MP_MAX_SPARE];
	u32 nr_spare_lw;
	/* What connections that have ended were charged with to the memory cgroup. */
	struct sock_charge charges[MP_MAX_SPARE];
	u32 nr_charges;

	/* Steps since softirqs were switched off, see light.c; 0: they are on. */
	u32 quiet;

	/* For light.c, zero but for what that sets: to clear one for each costs too much. */
	read_descriptor_t read_desc;
	struct msghdr write_msg;

	atomic_t nr_jobs;		/* that workers are at, see job.c */

	/*
	 * @lock guards @ready, @nr_ready and, in each handle, @armed, @link and
	 * (while the handle is armed or on the list) @events. The owner arms a
	 * handle that is neither armed nor on the list without it, and a callback
	 * that finds nothing armed does not take it.
	 * It is taken by wake-up callbacks, under the lock of a wait queue and
	 * with interrupts off, or under sk_callback_lock, and by jobs under their
	 * own lock; nothing is nested inside it.
	 */
	spinlock_t lock ____cacheline_aligned_in_smp;
	struct list_head ready;
	u32 nr_ready;

	/* For the batching lab: is the owner asleep? Plain mode ignores it. */
	int sleeping;
};

/* One place in a wait queue of a handle's file. */
struct mp_wait {
	struct mp_handle *handle;
	/*
	 * The queue; NULL: not in one. A listener that has been told is out of it
	 * until it waits again, and keeps this. Set by the owner; cleared by it, or by
	 * the callback when the queue itself goes (POLLFREE).
	 */
	wait_queue_head_t *head;
	wait_queue_entry_t entry;
};

struct mp_write {
	struct iov_iter iter;		/* what is left */
	struct iovec *iov;		/* to be freed, for writev */
	u32 moved;			/* bytes moved so far */
	u8 op;
};

/*
 * A handle: one file or lwsocket in one channel. At most one accept, one read
 * and one write are pending at a time; a second one completes with EBUSY.
 */
struct mp_handle {
	struct mp_channel *channel;
	const struct mp_kind *kind;
	u32 number;
	bool light;			/* an lwsocket: no @file, @sock is owned */
	bool listens;
	u64 cookie;
	struct file *file;		/* reference */
	struct file *listener;		/* of a part: what it is a part of; reference */
	struct socket *sock;		/* of @file, or the lwsocket; may be NULL */
	loff_t pos;			/* of files that have a position */

	/* Pending operations; the owner's. @pending: EPOLLIN, EPOLLOUT. */
	__poll_t pending;
	u32 accepts;			/* left of an accept; 0: a read is meant */
	bool accept_light;
	struct mp_job *read_job;	/* see job.c */
	struct mp_job *write_job;

	/* See the channel's @lock. */
	__poll_t armed;			/* events that make the handle ready */
	__poll_t events;		/* events that did */
	struct list_head link;		/* in channel->ready or a batch, or empty */

	/* How it learns of events: from wait queues, or as the lab's ->watch() has it. */
	bool watched;			/* ->unwatch() is to be called */
	struct mp_wait *second;		/* of a file with two queues (pipes) */

	/*
	 * From here on a handle that is used again is as it was left, for most of it is
	 * written before it is read. The rest, @write.iov and @wait.head, is NULL then.
	 */
	struct_group(kept,
		u32 read_len;
		u32 read_moved;		/* bytes so far, of a file with a position */
		u64 read_addr;
		loff_t read_pos;	/* with MP_AT_OFFSET, or -1 */
		loff_t write_pos;
		struct mp_write write;
		struct mp_wait wait;
	);
};

/*
 * What differs between kinds of files: one row per kind. Called by the owner.
 */
struct mp_kind {
	/* What poll() would say of @events, EPOLLERR and EPOLLHUP included. */
	__poll_t (*events)(const struct mp_handle *h, __poll_t events);
	/*
	 * Move data without blocking: read to where the pending read wants it,
	 * write what is left in @write.iter, which stays as it is. Bytes, a
	 * negative errno, -EAGAIN to be called again after the event, or
	 * -EIOCBQUEUED: a job has it, see job.c.
	 */
	ssize_t (*read)(struct mp_handle *h);
	ssize_t (*write)(struct mp_handle *h);
	/* A write goes on until all of it is moved (a stream). */
	bool whole;
	/*
	 * A file with a position: what cannot be done at once is done by jobs,
	 * which say themselves when it is, and requests may say MP_AT_OFFSET.
	 */
	bool offloads;
};

/* Where the pending read wants its bytes; whoever took the request has looked at the address. */
static __always_inline void mp_read_iter(const struct mp_handle *h, struct iov_iter *to)
{
	iov_iter_ubuf(to, ITER_DEST, u64_to_user_ptr(h->read_addr), h->read_len);
}

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

/*
 * Write a completion into the next slot; the caller has seen that there is room.
 * Inline, so that it is put together where it is to be.
 */
static __always_inline void mp_post(struct mp_channel *ch, struct mp_completion c)
{
	if (WARN_ON_ONCE(ch->cq_tail - ch->cq_head >= ch->cq_entries))
		return;
	ch->cq[ch->cq_tail & (ch->cq_entries - 1)] = c;
	ch->cq_tail++;
}

/* handle.c */
int mp_handle_init(void);
void mp_handle_exit(void);
struct mp_handle *mp_handle_add(struct mp_channel *ch, u32 number, u64 cookie);
void mp_handle_remove(struct mp_handle *h);
void mp_handle_remove_all(struct mp_channel *ch);
int mp_handle_join(struct mp_handle *h);
bool mp_handle_arm_again(struct mp_handle *h, __poll_t events);
void mp_handle_is_ready(struct mp_handle *h, __poll_t events);
void mp_handle_unwait(struct mp_handle *h);
void mp_handle_make_ready(struct mp_handle *h, __poll_t events);
void mp_handle_notify(struct mp_handle *h, __poll_t events);
bool mp_may_hold(const struct mp_channel *ch);

/* main.c */
void mp_execute_any(struct mp_channel *ch, const struct mp_request *req);

/* io.c */
int mp_register(struct mp_channel *ch, const struct mp_request *req);
int mp_accept(struct mp_handle *h, const struct mp_request *req);
int mp_read(struct mp_handle *h, const struct mp_request *req);
int mp_write(struct mp_handle *h, const struct mp_request *req);
int mp_write_rest(struct mp_handle *h, const struct mp_request *req, u32 moved);
int mp_disconnect(struct mp_handle *h, const struct mp_request *req);
int mp_convert(struct mp_handle *h, const struct mp_request *req);
int mp_drop(struct mp_channel *ch, const struct mp_request *req);
void mp_run_any(struct mp_handle *h);
bool mp_give_up(struct mp_handle *h, int error);
void mp_forget(struct mp_handle *h);
void mp_lw_close(struct mp_channel *ch, struct socket *lw);
void mp_lw_drop_all(struct mp_channel *ch);

/* socket.c */
const struct mp_kind *mp_socket_kind(const struct socket *sock);
extern const struct mp_kind mp_tcp_kind;

/* light.c */
void mp_quiet_end(struct mp_channel *ch);

/* file.c */
const struct mp_kind *mp_file_kind(const struct file *file);

/* job.c */
int mp_job_init(void);
void mp_job_exit(void);
int mp_job_start(struct mp_handle *h, struct iov_iter *iter, loff_t pos, bool write);
bool mp_job_done(struct mp_job *job);
ssize_t mp_job_take(struct mp_job **job, loff_t *pos);
void mp_job_forget(struct mp_job **job, struct iovec *iov);

#endif
