// SPDX-License-Identifier: GPL-2.0
/*
 * QEMU's main loop, kept out while the vCPUs run: a library for exact runs, loaded before QEMU's
 * own ones (LD_PRELOAD).
 *
 * With -icount, a timer of virtual time that is due is run by whoever comes first: the thread that
 * runs the vCPUs, when it has come round to the first of them, or the main loop, if the host has
 * just woken it (because all vCPUs were halted, say, and it is late in going back to sleep). Both
 * are right, but the next turn is another vCPU's, and from there on no two runs are the same.
 *
 * Here the main loop, once something has woken it, goes on only when the vCPUs' thread stands
 * still: because all vCPUs are halted, when it waits for the main loop to move time on, or at a
 * mark of the probe, where it sleeps. So every run comes to the same turns.
 *
 * QEMU's threads are told apart by what they do: the first one beside the main thread that waits
 * for a condition is the vCPUs', which does so until the machine starts; the condition is the one
 * on which it also waits while they are all halted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

/*
 * A machine that neither halts nor comes to a mark must still hear its monitor: after so many
 * seconds the main loop goes on all the same.
 */
#define PATIENCE 1

typedef int ppoll_function(struct pollfd *fds, nfds_t count, const struct timespec *timeout,
			   const sigset_t *mask);
typedef int wait_function(pthread_cond_t *condition, pthread_mutex_t *mutex);
typedef int wake_function(pthread_cond_t *condition);
typedef int sleep_function(const struct timespec *length, struct timespec *left);

static ppoll_function *real_ppoll;
static wait_function *real_wait;
static wake_function *real_broadcast, *real_signal;
static sleep_function *real_sleep;

static _Atomic(pthread_cond_t *) halted;	/* NULL: the vCPUs' thread is not known yet */
static _Thread_local bool runs_vcpus;
/*
 * Each side writes its own word, then reads the other's (sequentially consistent), so that at
 * least one of them sees the other.
 */
static atomic_int stands;	/* a futex: the vCPUs' thread sleeps, until it is woken */
static atomic_bool main_runs;

static void *next(const char *name)
{
	/* The first version of the conditions is another structure. */
	void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");

	if (!found)
		found = dlsym(RTLD_NEXT, name);
	if (!found)
		abort();
	return found;
}

__attribute__((constructor)) static void find_the_real_ones(void)
{
	real_ppoll = next("ppoll");
	real_wait = next("pthread_cond_wait");
	real_broadcast = next("pthread_cond_broadcast");
	real_signal = next("pthread_cond_signal");
	real_sleep = next("nanosleep");
}

static bool is_main_thread(void)
{
	return gettid() == getpid();
}

/* --- the vCPUs' thread ------------------------------------------------------------------- */

static void stand(void)
{
	atomic_store(&stands, 1);
	syscall(SYS_futex, &stands, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

EXPORTED int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
	pthread_cond_t *none = NULL;
	int error;

	if (!runs_vcpus && !is_main_thread())
		runs_vcpus = atomic_compare_exchange_strong(&halted, &none, condition);
	if (!runs_vcpus || condition != atomic_load(&halted))
		return real_wait(condition, mutex);
	/* The mutex is the main loop's, too: it gets no further before this thread sleeps. */
	stand();
	error = real_wait(condition, mutex);
	atomic_store(&stands, 0);
	return error;
}

/* From here on the thread runs, as soon as it gets the mutex that the caller has. */
static void run(pthread_cond_t *condition)
{
	if (condition == atomic_load(&halted))
		atomic_store(&stands, 0);
}

EXPORTED int pthread_cond_broadcast(pthread_cond_t *condition)
{
	run(condition);
	return real_broadcast(condition);
}

EXPORTED int pthread_cond_signal(pthread_cond_t *condition)
{
	run(condition);
	return real_signal(condition);
}

/* The probe's, at a mark. */
EXPORTED int nanosleep(const struct timespec *length, struct timespec *left)
{
	static const struct timespec moment = { .tv_nsec = 20000 };
	int error, tries = PATIENCE * 1000000000LL / moment.tv_nsec;

	if (!runs_vcpus)
		return real_sleep(length, left);
	stand();
	error = real_sleep(length, left);
	atomic_store(&stands, 0);
	while (atomic_load(&main_runs) && tries--)
		real_sleep(&moment, NULL);
	return error;
}

/* --- the main loop ------------------------------------------------------------------------- */

/* Return when the vCPUs' thread stands still, or after PATIENCE; the main loop then runs. */
static void wait_for_vcpus(void)
{
	static const struct timespec patience = { .tv_sec = PATIENCE };

	for (;;) {
		atomic_store(&main_runs, true);
		if (atomic_load(&stands))
			return;
		atomic_store(&main_runs, false);
		if (syscall(SYS_futex, &stands, FUTEX_WAIT_PRIVATE, 0, &patience, NULL, 0) &&
		    errno == ETIMEDOUT)
			break;
	}
	atomic_store(&main_runs, true);
}

EXPORTED int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout,
		   const sigset_t *mask)
{
	int ready, error;

	if (!is_main_thread() || !atomic_load(&halted))
		return real_ppoll(fds, count, timeout, mask);
	atomic_store(&main_runs, false);
	ready = real_ppoll(fds, count, timeout, mask);
	error = errno;
	wait_for_vcpus();
	errno = error;
	return ready;
}
