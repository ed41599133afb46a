// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: reads and writes that have to wait for a disk.
 *
 * A job is one such operation, done by a kernel worker that borrows the owner's
 * memory and credentials. Its handle may go meanwhile: the job then ends alone.
 * Its channel waits for it, as a process that ends does for its AIO.
 */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kthread.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>
#include <linux/workqueue.h>

#include "batch.h"

struct mp_job {
	struct work_struct work;
	refcount_t refs;		/* the handle's and the worker's */

	/* Set when it starts. */
	struct mp_channel *channel;	/* stays until nr_jobs is 0 */
	struct file *file;		/* reference */
	struct mm_struct *mm;		/* reference (mmgrab) */
	const struct cred *cred;	/* reference */
	bool write;
	struct iov_iter iter;

	loff_t pos;			/* the worker's, until @done */
	ssize_t result;			/* likewise */

	/* @lock guards what follows. Nested inside it: the channel's lock. */
	spinlock_t lock;
	struct mp_handle *handle;	/* NULL: nobody wants to know any more */
	struct iovec *iov;		/* the handle's, once that has gone */
	bool done;
};

static struct workqueue_struct *mp_workqueue;

int mp_job_init(void)
{
	mp_workqueue = alloc_workqueue("megapipe", WQ_UNBOUND, 0);
	return mp_workqueue ? 0 : -ENOMEM;
}

void mp_job_exit(void)
{
	destroy_workqueue(mp_workqueue);
}

static void mp_job_put(struct mp_job *job)
{
	if (!refcount_dec_and_test(&job->refs))
		return;
	kfree(job->iov);
	fput(job->file);
	mmdrop(job->mm);
	put_cred(job->cred);
	kfree(job);
}

static ssize_t mp_job_move(struct mp_job *job)
{
	struct kiocb kiocb;
	ssize_t ret;

	init_sync_kiocb(&kiocb, job->file);
	kiocb.ki_pos = job->pos;
	if (job->write)
		ret = vfs_iocb_iter_write(job->file, &kiocb, &job->iter);
	else
		ret = vfs_iocb_iter_read(job->file, &kiocb, &job->iter);
	if (ret > 0)
		job->pos = kiocb.ki_pos;
	/* A worker gets no signals; whoever asked is not to be told of one either. */
	return ret == -ERESTARTSYS ? -EINTR : ret;
}

static void mp_job_work(struct work_struct *work)
{
	struct mp_job *job = container_of(work, struct mp_job, work);
	struct mp_channel *ch = job->channel;
	const struct cred *old = override_creds(job->cred);

	/* The process may have ended: then there is no memory to move it to. */
	if (mmget_not_zero(job->mm)) {
		kthread_use_mm(job->mm);
		job->result = mp_job_move(job);
		kthread_unuse_mm(job->mm);
		mmput(job->mm);
	} else {
		job->result = -EFAULT;
	}
	revert_creds(old);

	spin_lock(&job->lock);
	job->done = true;
	if (job->handle)
		mp_handle_notify(job->handle, job->write ? EPOLLOUT : EPOLLIN);
	spin_unlock(&job->lock);
	mp_job_put(job);
	if (atomic_dec_and_test(&ch->nr_jobs))
		wake_up_var(&ch->nr_jobs);
}

/*
 * Move @iter from or to @pos. A worker has no limits of its own, so that the
 * owner's on the size of a file is applied here.
 */
int mp_job_start(struct mp_handle *h, struct iov_iter *iter, loff_t pos, bool write)
{
	unsigned long limit = rlimit(RLIMIT_FSIZE);
	struct mp_job *job;

	if (write && limit != RLIM_INFINITY) {
		if (h->file->f_flags & O_APPEND)
			pos = i_size_read(file_inode(h->file));
		if (pos >= limit)
			return -EFBIG;
		iov_iter_truncate(iter, limit - pos);
	}
	job = kzalloc(sizeof(*job), GFP_KERNEL_ACCOUNT);
	if (!job)
		return -ENOMEM;
	INIT_WORK(&job->work, mp_job_work);
	refcount_set(&job->refs, 2);
	job->channel = h->channel;
	atomic_inc(&h->channel->nr_jobs);
	job->file = get_file(h->file);
	job->mm = h->channel->mm;
	mmgrab(job->mm);
	job->cred = get_current_cred();
	job->write = write;
	job->iter = *iter;
	job->pos = pos;
	spin_lock_init(&job->lock);
	job->handle = h;
	if (write)
		h->write_job = job;
	else
		h->read_job = job;
	queue_work(mp_workqueue, &job->work);
	return 0;
}

bool mp_job_done(struct mp_job *job)
{
	bool done;

	spin_lock(&job->lock);
	done = job->done;
	spin_unlock(&job->lock);
	return done;
}

/* Returns the result of a job that is done, and frees it. */
ssize_t mp_job_take(struct mp_job **job, loff_t *pos)
{
	ssize_t result = (*job)->result;

	if (result > 0)
		*pos = (*job)->pos;
	mp_job_put(*job);
	*job = NULL;
	return result;
}

/* The handle goes. What the job still moves is moved from @iov, which is its own now. */
void mp_job_forget(struct mp_job **job, struct iovec *iov)
{
	spin_lock(&(*job)->lock);
	(*job)->handle = NULL;
	(*job)->iov = iov;
	spin_unlock(&(*job)->lock);
	mp_job_put(*job);
	*job = NULL;
}
