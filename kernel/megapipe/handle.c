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

static bool mp_handle_listens(const struct mp_handle *h)
{
	return h->wait.flags & WQ_FLAG_EXCLUSIVE;
}

/*
 * Called by whatever wakes the file's wait queue: any context, the queue's
 * lock held, interrupts off. Returns 1 if this handle will deal with the event;
 * of several channels waiting for one listener, exactly one must.
 */
static int mp_handle_callback(wait_queue_entry_t *wait, unsigned int mode, int sync, void *key)
{
	struct mp_handle *h = container_of(wait, struct mp_handle, wait);
	struct mp_channel *ch = h->channel;
	__poll_t events = key_to_poll(key);
	bool ready = false;
	unsigned long flags;

	if (!events)	/* a wake-up that does not say what for */
		events = EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP;

	spin_lock_irqsave(&ch->lock, flags);
	if (h->armed && (events & (h->armed | EPOLLERR | EPOLLHUP))) {
		h->armed = 0;
		h->events = events;
		list_add_tail(&h->link, &ch->ready);
		ch->nr_ready++;
		ready = true;
	}
	spin_unlock_irqrestore(&ch->lock, flags);

	if (!ready)
		return 0;
	/*
	 * The next connection is for the next channel: exclusive waiters are
	 * served in the order of the queue, and this entry would stay first.
	 */
	if (mp_handle_listens(h))
		list_move_tail(&wait->entry, &h->whead->head);
	ch->batch->wake(ch);
	return 1;
}

struct mp_watch {
	poll_table table;
	struct mp_handle *handle;
};

static void mp_handle_watch(struct file *file, wait_queue_head_t *whead, poll_table *table)
{
	struct mp_handle *h = container_of(table, struct mp_watch, table)->handle;

	if (WARN_ON_ONCE(h->whead))	/* a socket has one wait queue */
		return;
	h->whead = whead;
	if (mp_handle_listens(h))
		add_wait_queue_exclusive(whead, &h->wait);
	else
		add_wait_queue(whead, &h->wait);
}

/*
 * Make the handle ready when one of @events happens, or at once if one has
 * happened already.
 *
 * No event is lost in between: the handle is armed before the file is asked,
 * and whoever makes the file ready does so before it calls back.
 */
void mp_handle_wait(struct mp_handle *h, __poll_t events)
{
	struct mp_channel *ch = h->channel;
	struct mp_watch watch = { .handle = h };
	__poll_t now;

	spin_lock_irq(&ch->lock);
	if (!list_empty(&h->link)) {	/* it will be run anyway */
		spin_unlock_irq(&ch->lock);
		return;
	}
	h->armed = events;
	spin_unlock_irq(&ch->lock);

	if (h->whead) {
		now = mp_socket_events(h, events);
	} else {
		init_poll_funcptr(&watch.table, mp_handle_watch);
		watch.table._key = events | EPOLLERR | EPOLLHUP;
		now = vfs_poll(h->file, &watch.table) & watch.table._key;
		/* What is on the error queue (time stamps, say) is not for an operation. */
		if (!READ_ONCE(h->sock->sk->sk_err))
			now &= ~EPOLLERR;
	}
	if (!now)
		return;

	spin_lock_irq(&ch->lock);
	if (h->armed) {			/* else the callback was faster */
		h->armed = 0;
		h->events = now;
		list_add_tail(&h->link, &ch->ready);
		ch->nr_ready++;
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
	if (list_empty(&h->link)) {
		list_add_tail(&h->link, &ch->ready);
		ch->nr_ready++;
	}
	spin_unlock_irq(&ch->lock);
}

static int mp_handle_make_slot(struct mp_channel *ch, u32 number)
{
	struct mp_handle **more;
	u32 slots;

	if (number >= MP_MAX_HANDLES)
		return -EINVAL;
	if (number < ch->nr_handles)
		return 0;
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

/* Takes over the reference to @file, but not if it fails. */
int mp_handle_add(struct mp_channel *ch, u32 number, struct file *file, u64 cookie)
{
	struct socket *sock = sock_from_file(file);
	struct mp_handle *h;
	int ret;

	ret = mp_handle_make_slot(ch, number);
	if (ret)
		return ret;
	if (ch->handles[number])
		return -EEXIST;
	/* A handle keeps its file open when the descriptor has been closed. */
	if (ch->nr_registered >= rlimit(RLIMIT_NOFILE))
		return -EMFILE;
	h = kmem_cache_zalloc(mp_handle_cache, GFP_KERNEL);
	if (!h)
		return -ENOMEM;
	h->channel = ch;
	h->number = number;
	h->cookie = cookie;
	h->file = file;
	h->sock = sock;
	INIT_LIST_HEAD(&h->link);
	init_waitqueue_func_entry(&h->wait, mp_handle_callback);
	if (inet_sk_state_load(sock->sk) == TCP_LISTEN)
		h->wait.flags |= WQ_FLAG_EXCLUSIVE;

	ch->handles[number] = h;
	ch->nr_registered++;
	return 0;
}

static void mp_handle_free(struct mp_handle *h)
{
	struct mp_channel *ch = h->channel;

	/* Waits for a callback that is running; after it none will. */
	if (h->whead)
		remove_wait_queue(h->whead, &h->wait);

	spin_lock_irq(&ch->lock);
	if (!list_empty(&h->link)) {
		list_del_init(&h->link);
		ch->nr_ready--;
	}
	spin_unlock_irq(&ch->lock);

	/*
	 * This handle may have been told of a connection that it will now not
	 * accept; of all the waiters, nobody else was. Tell the next.
	 */
	if (h->whead && mp_handle_listens(h) &&
	    !reqsk_queue_empty(&inet_csk(h->sock->sk)->icsk_accept_queue))
		wake_up_interruptible_poll(h->whead, EPOLLIN | EPOLLRDNORM);

	mp_socket_forget(h);
	fput(h->file);
	kmem_cache_free(mp_handle_cache, h);
}

void mp_handle_remove(struct mp_handle *h)
{
	h->channel->handles[h->number] = NULL;
	h->channel->nr_registered--;
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
}

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

u32 mp_ready_take(struct mp_channel *ch, struct list_head *batch)
{
	u32 count;

	spin_lock_irq(&ch->lock);
	list_splice_tail_init(&ch->ready, batch);
	count = ch->nr_ready;
	ch->nr_ready = 0;
	spin_unlock_irq(&ch->lock);
	return count;
}

void mp_ready_return(struct mp_channel *ch, struct list_head *batch, u32 count)
{
	spin_lock_irq(&ch->lock);
	list_splice_init(batch, &ch->ready);
	ch->nr_ready += count;
	spin_unlock_irq(&ch->lock);
}

void mp_run(struct mp_handle *h)
{
	__poll_t events;

	if (!list_empty(&h->link))	/* still linked in the caller's batch */
		list_del_init(&h->link);
	/* Disarmed, off the list: the callback leaves @events alone. */
	events = h->events;
	h->events = 0;
	mp_socket_progress(h, events);
}
