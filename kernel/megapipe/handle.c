// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: handles, and how they become ready.
 *
 * A handle whose operation would block is *armed* with the events it waits
 * for. The callback in the file's wait queue disarms it, notes the events and
 * puts it on the channel's list of ready handles. So a handle is on the list
 * at most once, and while @armed is 0 the callback leaves it alone.
 */
#include <linux/file.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/net.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <net/inet_connection_sock.h>

#include "batch.h"
#include "lwsocket.h"
#include "partition.h"

static struct kmem_cache *mp_handle_cache;

int mp_handle_init(void)
{
	mp_handle_cache = KMEM_CACHE(mp_handle, SLAB_ACCOUNT);
	return mp_handle_cache ? 0 : -ENOMEM;
}

void mp_handle_exit(void)
{
	kmem_cache_destroy(mp_handle_cache);
}

/* --- becoming ready ----------------------------------------------------------- */

/* The channel's lock is held. */
static void mp_handle_enlist(struct mp_handle *h)
{
	list_add_tail(&h->link, &h->channel->ready);
	h->channel->nr_ready++;
}

/* Returns whether the handle, armed for one of @events, has become ready by it. */
static bool mp_handle_happened(struct mp_handle *h, __poll_t events)
{
	struct mp_channel *ch = h->channel;
	bool ready = false;
	unsigned long flags;
	__poll_t armed;

	/* What has happened is there before @armed is read. Pairs with mp_handle_wait(). */
	smp_mb();
	if (!READ_ONCE(h->armed))
		return false;
	spin_lock_irqsave(&ch->lock, flags);
	armed = READ_ONCE(h->armed);
	if (armed && (events & (armed | EPOLLERR | EPOLLHUP))) {
		h->events = events;
		mp_handle_enlist(h);
		/* Release: who sees it disarmed sees it on the list. Pairs, likewise. */
		smp_store_release(&h->armed, 0);
		ready = true;
	}
	spin_unlock_irqrestore(&ch->lock, flags);
	return ready;
}

/*
 * Called by whatever wakes the file's wait queue: any context, the queue's
 * lock held, interrupts off. Returns 1 if this handle will deal with the event;
 * of several channels waiting for one listener, exactly one must.
 */
static int mp_wait_callback(wait_queue_entry_t *entry, unsigned int mode, int sync, void *key)
{
	struct mp_wait *w = container_of(entry, struct mp_wait, entry);
	struct mp_handle *h = w->handle;
	__poll_t events = key_to_poll(key);
	bool ready;

	if (!events)	/* a wake-up that does not say what for */
		events = EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP;

	ready = mp_handle_happened(h, events);
	if (ready) {
		/*
		 * The next connection is for the next channel. This one comes
		 * back, last in the queue, when it waits again; until then
		 * connections arrive without asking it.
		 */
		if (h->listens)
			list_del_init(&entry->entry);
		h->channel->batch->wake(h->channel);
	}
	if (unlikely(events & POLLFREE)) {
		/* The queue's memory goes (signalfd), so leave it now. */
		list_del_init(&entry->entry);
		/*
		 * Release: the last access to the handle from here. Pairs with
		 * the acquire in mp_wait_leave(), which may then not wait for us.
		 */
		smp_store_release(&w->head, NULL);
	}
	return ready;
}

static void mp_wait_join(struct mp_wait *w, struct mp_handle *h, wait_queue_head_t *head)
{
	w->handle = h;
	w->head = head;
	init_waitqueue_func_entry(&w->entry, mp_wait_callback);
	if (h->listens)
		add_wait_queue_exclusive(head, &w->entry);
	else
		add_wait_queue(head, &w->entry);
}

/*
 * Come back into the queue of a listener. The lock is that of the callback, which
 * may be about to take the entry out because of the wait before.
 */
static void mp_wait_join_again(struct mp_wait *w)
{
	spin_lock_irq(&w->head->lock);
	if (list_empty(&w->entry.entry))
		__add_wait_queue_entry_tail_exclusive(w->head, &w->entry);
	spin_unlock_irq(&w->head->lock);
}

/* Waits for a callback that is running; after it none will. */
static void mp_wait_leave(struct mp_wait *w)
{
	wait_queue_head_t *head;

	/* Whoever frees a queue that was left by POLLFREE does so after a grace period. */
	rcu_read_lock();
	/* Pairs with the release in mp_wait_callback(). */
	head = smp_load_acquire(&w->head);
	if (head) {
		spin_lock_irq(&head->lock);
		list_del_init(&w->entry.entry);
		spin_unlock_irq(&head->lock);
		w->head = NULL;
	}
	rcu_read_unlock();
}

struct mp_watch {
	poll_table table;
	struct mp_handle *handle;
	int error;
};

/* Called by the file's poll operation for each of its wait queues. */
static void mp_watch_queue(struct file *file, wait_queue_head_t *head, poll_table *table)
{
	struct mp_watch *watch = container_of(table, struct mp_watch, table);
	struct mp_handle *h = watch->handle;
	struct mp_wait *w = &h->wait;

	if (w->head == head)
		return;
	if (w->head) {
		if (!h->second)
			h->second = kzalloc(sizeof(*h->second), GFP_KERNEL_ACCOUNT);
		w = h->second;
		if (!w || w->head) {
			watch->error = w ? -EOPNOTSUPP : -ENOMEM;
			return;
		}
	}
	mp_wait_join(w, h, head);
}

/* Leave the wait queues: no callback runs any more, nor will. The handle stays ready if it is. */
void mp_handle_unwait(struct mp_handle *h)
{
	if (h->watched) {
		h->channel->lwsocket->unwatch(h->sock);
		h->watched = false;
	} else {
		mp_wait_leave(&h->wait);
		if (h->second)
			mp_wait_leave(h->second);
	}
	/* No callback, nobody but the owner; what jobs finish has no callbacks (see file.c). */
	h->armed = 0;
}

/* Join the wait queues of the handle's file, once; 0 or a negative errno. */
static int mp_handle_watch(struct mp_handle *h)
{
	struct mp_watch watch = { .handle = h };

	if (h->light && h->channel->lwsocket->watch(h->sock, h)) {
		h->watched = true;
		return 0;
	}
	/* A TCP socket has this one queue. An lwsocket has no file to ask. */
	if (h->kind == &mp_tcp_kind) {
		mp_wait_join(&h->wait, h, &h->sock->wq.wait);
		return 0;
	}
	init_poll_funcptr(&watch.table, mp_watch_queue);
	watch.table._key = EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP;
	vfs_poll(h->file, &watch.table);
	if (!watch.error && !h->wait.head)
		watch.error = -EOPNOTSUPP;
	if (watch.error)
		mp_handle_unwait(h);
	return watch.error;
}

/* See to it that a handle that is armed learns of events; 0 or a negative errno. */
int mp_handle_join(struct mp_handle *h)
{
	bool joined = READ_ONCE(h->wait.head);

	if (joined && h->listens)
		mp_wait_join_again(&h->wait);
	else if (!joined && !h->kind->offloads)
		return mp_handle_watch(h);
	return 0;
}

/* Arm a handle that may be armed, or on the list, already. Returns whether it is armed. */
bool mp_handle_arm_again(struct mp_handle *h, __poll_t events)
{
	struct mp_channel *ch = h->channel;
	bool armed;

	spin_lock_irq(&ch->lock);
	armed = list_empty(&h->link);	/* else it will be run anyway */
	if (armed)
		h->armed = events;
	spin_unlock_irq(&ch->lock);
	return armed;
}

/* Put an armed handle on the list, because @events have happened already. */
void mp_handle_is_ready(struct mp_handle *h, __poll_t events)
{
	struct mp_channel *ch = h->channel;

	spin_lock_irq(&ch->lock);
	if (h->armed) {			/* else the callback was faster */
		h->armed = 0;
		h->events = events;
		mp_handle_enlist(h);
	}
	spin_unlock_irq(&ch->lock);
}

/* Put the handle on the list by hand: its operation could go on, given room. */
void mp_handle_make_ready(struct mp_handle *h, __poll_t events)
{
	struct mp_channel *ch = h->channel;

	spin_lock_irq(&ch->lock);
	h->armed = 0;
	h->events |= events;
	if (list_empty(&h->link))
		mp_handle_enlist(h);
	spin_unlock_irq(&ch->lock);
}

/*
 * Something that is no wait queue (a job, see job.c, or an lwsocket's callback)
 * has made @events happen. The caller sees to it that the handle stays.
 */
void mp_handle_notify(struct mp_handle *h, __poll_t events)
{
	if (mp_handle_happened(h, events))
		h->channel->batch->wake(h->channel);
}

/* --- making and removing handles ------------------------------------------------ */

static noinline int mp_handle_make_slot(struct mp_channel *ch, u32 number)
{
	struct mp_handle **more;
	u32 slots;

	if (number >= MP_MAX_HANDLES)
		return -EINVAL;
	slots = max(64UL, roundup_pow_of_two(number + 1));
	more = kvcalloc(slots, sizeof(*more), GFP_KERNEL_ACCOUNT);
	if (!more)
		return -ENOMEM;
	if (ch->nr_handles)
		memcpy(more, ch->handles, ch->nr_handles * sizeof(*more));
	kvfree(ch->handles);
	ch->handles = more;
	ch->nr_handles = slots;
	return 0;
}

/* A handle keeps its file open when the descriptor has been closed. */
bool mp_may_hold(const struct mp_channel *ch)
{
	return ch->nr_held < rlimit(RLIMIT_NOFILE);
}

/* Returns a handle that holds nothing yet, or ERR_PTR(). */
struct mp_handle *mp_handle_add(struct mp_channel *ch, u32 number, u64 cookie)
{
	struct mp_handle *h;
	int ret;

	if (unlikely(number >= ch->nr_handles)) {
		ret = mp_handle_make_slot(ch, number);
		if (ret)
			return ERR_PTR(ret);
	}
	if (ch->handles[number])
		return ERR_PTR(-EEXIST);
	if (!mp_may_hold(ch))
		return ERR_PTR(-EMFILE);
	if (ch->nr_spare) {
		h = ch->spare[--ch->nr_spare];
		memset(h, 0, offsetof(struct mp_handle, kept));
	} else {
		h = kmem_cache_zalloc(mp_handle_cache, GFP_KERNEL);
		if (!h)
			return ERR_PTR(-ENOMEM);
	}
	h->channel = ch;
	h->number = number;
	h->cookie = cookie;
	INIT_LIST_HEAD(&h->link);

	ch->handles[number] = h;
	ch->nr_held++;
	return h;
}

static void mp_handle_free(struct mp_handle *h)
{
	struct mp_channel *ch = h->channel;

	/* First the jobs: one that ends now would put the handle on the list. */
	mp_forget(h);
	mp_handle_unwait(h);
	if (unlikely(h->second))
		kfree(h->second);

	/* Nobody but us can put it on the list any more, or take it off. */
	if (!list_empty(&h->link)) {
		spin_lock_irq(&ch->lock);
		list_del_init(&h->link);
		ch->nr_ready--;
		spin_unlock_irq(&ch->lock);
	}

	/*
	 * This handle may have been told of a connection that it will now not
	 * accept; of all the waiters, nobody else was. Tell the next.
	 */
	if (h->listens && (h->kind != &mp_tcp_kind ||
			   !reqsk_queue_empty(&inet_csk(h->sock->sk)->icsk_accept_queue)))
		wake_up_interruptible_poll(&h->sock->wq.wait, EPOLLIN | EPOLLRDNORM);

	if (h->light) {
		mp_lw_close(ch, h->sock);
	} else if (h->listener) {
		ch->partition->close(h->listener, h->file);
		fput(h->listener);
	} else if (h->file) {
		fput(h->file);
	}
	if (ch->nr_spare < MP_MAX_SPARE)
		ch->spare[ch->nr_spare++] = h;
	else
		kmem_cache_free(mp_handle_cache, h);
}

void mp_handle_remove(struct mp_handle *h)
{
	h->channel->handles[h->number] = NULL;
	h->channel->nr_held--;
	mp_handle_free(h);
}

void mp_handle_remove_all(struct mp_channel *ch)
{
	u32 number;

	for (number = 0; number < ch->nr_handles; number++) {
		if (ch->handles[number])
			mp_handle_free(ch->handles[number]);
		cond_resched();
	}
	kvfree(ch->handles);
	while (ch->nr_spare)
		kmem_cache_free(mp_handle_cache, ch->spare[--ch->nr_spare]);
}

/* --- the list of ready handles --------------------------------------------------- */

struct mp_handle *mp_ready_pop(struct mp_channel *ch)
{
	struct mp_handle *h;

	spin_lock_irq(&ch->lock);
	h = list_first_entry_or_null(&ch->ready, struct mp_handle, link);
	if (h) {
		list_del_init(&h->link);
		ch->nr_ready--;
	}
	spin_unlock_irq(&ch->lock);
	return h;
}
