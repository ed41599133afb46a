// SPDX-License-Identifier: GPL-2.0-only
/* Batching, written another way: what a kernel developer may reach for. It compiles; no more. */
#include <linux/atomic.h>
#include <linux/bitops.h>
#include <linux/cpumask.h>
#include <linux/ktime.h>
#include <linux/percpu.h>
#include <linux/printk.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/xarray.h>

#include "batch.h"

#define AT_ONCE		64
#define at_most(a, b)	min_t(u32, (a), (b))

struct crossing {
	struct list_head link;
	struct rcu_head rcu;
	refcount_t users;
	ktime_t begun;
	u32 taken;
};

static DEFINE_PER_CPU(u64, crossings);
static DEFINE_SPINLOCK(lock);
static DEFINE_MUTEX(mutex);
static DEFINE_RWLOCK(rwlock);
static DEFINE_XARRAY(owners);
static LIST_HEAD(recent);
static atomic_t awake_owners = ATOMIC_INIT(0);
static unsigned long flags_of_owners[BITS_TO_LONGS(AT_ONCE)];

static int by_handle(const void *a, const void *b)
{
	const struct mp_request *left = a, *right = b;

	return (int)left->handle - (int)right->handle;
}

static noinline __maybe_unused void remember(u32 taken)
{
	struct crossing *c = kmalloc(sizeof(*c), GFP_KERNEL | __GFP_NOWARN), *next;
	unsigned long flags;

	if (!c)
		return;
	*c = (struct crossing){ .begun = ktime_get(), .taken = taken };
	refcount_set(&c->users, 1);
	spin_lock_irqsave(&lock, flags);
	list_add_tail(&c->link, &recent);
	spin_unlock_irqrestore(&lock, flags);

	mutex_lock(&mutex);
	list_for_each_entry_safe(c, next, &recent, link) {
		if (ktime_before(ktime_add_ms(c->begun, 10), ktime_get()) &&
		    refcount_dec_and_test(&c->users)) {
			list_del_rcu(&c->link);
			kfree_rcu(c, rcu);
		}
	}
	mutex_unlock(&mutex);
}

static u32 batched_drain(struct mp_channel *ch)
{
	struct mp_request *requests;
	u32 i, count = at_most(mp_sq_waiting(ch), AT_ONCE);

	if (WARN_ON_ONCE(count > ch->sq_entries))
		return 0;
	requests = kcalloc(count, sizeof(*requests), GFP_KERNEL);
	if (!requests) {
		pr_warn_ratelimited("megapipe: no memory for %u requests\n", count);
		return mp_plain_ops.drain(ch);
	}
	for (i = 0; i < count; i++)
		mp_sq_read(ch, i, &requests[i]);
	sort(requests, count, sizeof(*requests), by_handle, NULL);
	for (i = 0; i < count && mp_cq_room(ch); i++) {
		mp_execute(ch, memchr_inv(&requests[i], 0, sizeof(*requests)) ? &requests[i] :
									     requests);
		cond_resched();
	}
	mp_sq_advance(ch, i);
	mp_cq_publish(ch);
	kfree(requests);
	this_cpu_add(crossings, i);
	pr_debug("took %u\n", i);
	remember(i);
	return i;
}

static u32 batched_complete(struct mp_channel *ch)
{
	struct mp_handle *h, *next;
	LIST_HEAD(batch);
	u32 left;

	spin_lock_irq(&ch->lock);
	list_splice_tail_init(&ch->ready, &batch);
	left = ch->nr_ready;
	ch->nr_ready = 0;
	spin_unlock_irq(&ch->lock);
	list_for_each_entry_safe(h, next, &batch, link) {
		if (unlikely(!mp_cq_room(ch)))
			break;
		mp_run(h);
		left--;
	}
	if (!list_empty(&batch)) {
		scoped_guard(spinlock_irq, &ch->lock) {
			list_splice(&batch, &ch->ready);
			ch->nr_ready += left;
		}
	}
	mp_cq_publish(ch);
	return mp_cq_filled(ch);
}

static int batched_sleep(struct mp_channel *ch, ktime_t *deadline)
{
	bool late = false;

	set_current_state(TASK_INTERRUPTIBLE);
	smp_store_mb(ch->sleeping, 1);
	set_bit(smp_processor_id() % AT_ONCE, flags_of_owners);
	smp_mb__after_atomic();
	if (!mp_ready_count(ch))
		late = !schedule_hrtimeout_range(deadline, current->timer_slack_ns,
						 HRTIMER_MODE_ABS);
	__set_current_state(TASK_RUNNING);
	smp_store_release(&ch->sleeping, 0);
	atomic_inc(&awake_owners);
	read_lock(&rwlock);
	xa_store(&owners, ch->owner->pid, ch, GFP_ATOMIC);
	read_unlock(&rwlock);
	return late ? -ETIME : 0;
}

static void batched_wake(struct mp_channel *ch)
{
	int cpu, old = 1;
	u64 sum = 0;

	smp_mb__before_atomic();
	for_each_online_cpu(cpu)
		sum += per_cpu(crossings, cpu);
	if (try_cmpxchg(&ch->sleeping, &old, 0) || test_and_clear_bit(sum % AT_ONCE, flags_of_owners))
		mp_wake_owner(ch);
	else if (atomic_dec_and_test(&awake_owners))
		wake_up_process(ch->owner);
}

const struct mp_batch_ops mp_batched_ops = {
	.drain = batched_drain,
	.complete = batched_complete,
	.sleep = batched_sleep,
	.wake = batched_wake,
};
