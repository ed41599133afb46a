// SPDX-License-Identifier: GPL-2.0
/* Other threads and other processes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "test.h"

static void *foreign_library(void *argument)
{
	struct mp_event e;

	EXPECT(mp_dispatch(argument, &e, 0), -EPERM);
	EXPECT(mp_dispatch(argument, &e, -1), -EPERM);
	return NULL;
}

static void *foreign_raw(void *argument)
{
	struct raw *r = argument;

	EXPECT(enter(r->fd, 0), -EPERM);
	EXPECT(enter(r->fd, MP_ENTER_SUBMIT), -EPERM);
	EXPECT(enter(r->fd, MP_ENTER_WAIT), -EPERM);
	EXPECT(enter(r->fd, -1), -EPERM);
	/* The memory is the process's, not the thread's. */
	EXPECT(r->shared->sq_head, r->sq_tail);
	return NULL;
}

static void test_foreign_thread(void)
{
	struct mp_channel *ch = channel();
	struct raw r = raw_channel(4, 4);

	join(start(foreign_library, ch));
	still_works(ch);
	join(start(foreign_raw, &r));
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_READ }).result, -ENOENT);
	raw_close(&r);
	mp_close(ch);
}

static void *make_and_leave(void *argument)
{
	struct pair *p = argument;
	static struct raw r;
	static char buffer;

	r = raw_channel(4, 4);
	raw_register(&r, 0, p->mine);
	raw_begin(&r, (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)&buffer, .len = 1 });
	return &r;
}

/* A channel whose thread is gone belongs to nobody, and still ends in order. */
static void test_owner_gone(void)
{
	struct pair p = tcp_pair(0);
	pthread_t thread = start(make_and_leave, &p);
	struct raw *r;
	void *ret;

	EXPECT(pthread_join(thread, &ret), 0);
	r = ret;
	sleep_ms(10);
	peer_sends(&p, "x");
	for (int i = 0; i < 20; i++)
		join(start(foreign_raw, r));
	close(p.mine);
	peer_sees_life(p.peer);
	raw_close(r);
	peer_sees_end(p.peer);
	close(p.peer);
}

static void *close_under(void *argument)
{
	struct raw *r = argument;

	sleep_ms(50);
	MUST(munmap(r->shared, r->args.bytes));
	MUST(close(r->fd));
	return NULL;
}

/* Another thread closes the channel in which its owner sleeps. */
static void test_close_under_owner(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	pthread_t thread;
	char buffer;

	raw_register(&r, 0, p.mine);
	raw_begin(&r, (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)&buffer, .len = 1 });
	close(p.mine);
	thread = start(close_under, &r);
	EXPECT(raw_wait(&r, 0, 150000000), 0);
	join(thread);
	EXPECT(enter(r.fd, 0), -EBADF);
	peer_sees_end(p.peer);
	close(p.peer);
}

static void test_fork(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	pid_t pid, touch;
	int ready[2];
	char byte;

	raw_register(&r, 0, p.mine);
	MUST(pipe(ready));
	pid = child();
	if (!pid) {
		EXPECT(minus_errno(fcntl(r.fd, F_GETFD)), -EBADF);
		EXPECT(enter(r.fd, 0), -EBADF);
		EXPECT(minus_errno(ioctl(r.fd, MP_IOC_CREATE, &r.args)), -EBADF);
		touch = MUST(fork());
		if (!touch)
			_exit(*(volatile uint32_t *)&r.shared->sq_head + 100);
		EXPECT(WTERMSIG(status_of(touch)), SIGSEGV);
		/* Its number is free for others. */
		EXPECT(dup2(0, r.fd), r.fd);
		close(r.fd);
		close(p.mine);
		close(p.peer);
		MUST(write(ready[1], "", 1));
		pause();
	}
	MUST(close(ready[1]));
	if (read(ready[0], &byte, 1) == 1) {
		/* The child lives; the channel and its connection end all the same. */
		close(p.mine);
		peer_sees_life(p.peer);
		raw_close(&r);
		peer_sees_end(p.peer);
		MUST(kill(pid, SIGKILL));
		status_of(pid);
	} else {
		child_ends_well(pid);
	}
	close(p.peer);
}

/* A child that tidies up must not end its parent's channel, nor anything of its own. */
static void test_fork_closes(void)
{
	struct mp_channel *ch = channel();
	struct pair p = added_pair(ch, 0);
	char buffer[8];
	pid_t pid;
	int fds;

	EXPECT(mp_read(ch, p.handle, buffer, sizeof(buffer)), 0);
	NOTHING(ch);
	pid = child();
	if (!pid) {
		while (open_descriptors() < 20)
			MUST(open("/dev/null", O_RDONLY));
		fds = open_descriptors();
		mp_close(ch);
		EXPECT(open_descriptors(), fds);
		_exit(0);
	}
	child_ends_well(pid);
	peer_sends(&p, "x");
	WANT(ch, p.handle, MP_OP_READ, 1);
	still_works(ch);
	mp_close(ch);
	end_pair(&p);
}

static void *unshare_files(void *argument)
{
	struct raw r = raw_channel(4, 4);

	(void)argument;
	EXPECT(enter(r.fd, 0), 0);
	MUST(unshare(CLONE_FILES));
	EXPECT(enter(r.fd, 0), -EBADF);
	return NULL;
}

static void test_unshare(void)
{
	join(start(unshare_files, NULL));
}

int send_descriptor(int over, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	return minus_errno(sendmsg(over, &message, 0));
}

/* Not over a UNIX socket; whoever may trace its maker gets hold of it all the same. */
static void test_descriptor_passed(void)
{
	int listener = listening(), over[2], fd, peer, pidfd;
	pid_t maker;

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, over));
	peer = connected(listener);
	maker = child();
	if (!maker) {
		struct raw r = raw_channel(8, 8);
		int mine = MUST(accept(listener, NULL, NULL));

		close(peer);
		raw_register(&r, 0, mine);
		EXPECT(send_descriptor(over[1], r.fd), -EINVAL);
		EXPECT(send_descriptor(over[1], mine), 1);
		EXPECT(write(over[1], &r.fd, sizeof(r.fd)), sizeof(r.fd));
		pause();
	}
	EXPECT(recv(over[0], &fd, 1, 0), 1);
	EXPECT(read(over[0], &fd, sizeof(fd)), sizeof(fd));
	pidfd = MUST(syscall(SYS_pidfd_open, maker, 0));
	fd = MUST(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
	close(pidfd);
	EXPECT(enter(fd, 0), -EPERM);
	EXPECT(enter(fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), -EPERM);
	TRUE(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED);
	EXPECT(errno, EPERM);
	/* Its maker is killed; the channel is there as long as someone has it. */
	MUST(kill(maker, SIGKILL));
	status_of(maker);
	sleep_ms(10);
	EXPECT(enter(fd, 0), -EPERM);
	EXPECT(send(peer, "x", 1, MSG_NOSIGNAL), 1);
	peer_sees_life(peer);
	close(fd);
	peer_sees_end(peer);
	close(peer);
	close(listener);
}

/* What the program finds that --exec-child starts again; @want is for the crossing. */
int exec_child(char **arguments)
{
	int fd = atoi(arguments[0]), want = atoi(arguments[2]);

	report_fd = atoi(arguments[1]);
	EXPECT(enter(fd, 0), want);
	EXPECT(enter(fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), want);
	TRUE(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
	EXPECT(-errno, want);
	return 0;
}

static void test_exec(void)
{
	for (int keep = 0; keep < 2; keep++) {
		char numbers[3][16];
		pid_t pid = child();
		struct raw r;

		if (pid) {
			child_ends_well(pid);
			continue;
		}
		r = raw_channel(64, 32);
		EXPECT(MUST(fcntl(r.fd, F_GETFD)), FD_CLOEXEC);
		if (keep)
			MUST(fcntl(r.fd, F_SETFD, 0));
		snprintf(numbers[0], 16, "%d", r.fd);
		snprintf(numbers[1], 16, "%d", (int)MUST(dup(report_fd)));
		snprintf(numbers[2], 16, "%d", keep ? -EPERM : -EBADF);
		execl("/proc/self/exe", "mp-test", "--exec-child", numbers[0], numbers[1],
		      numbers[2], NULL);
		fail("execl: %s", strerror(errno));
	}
}

const struct test_case processes_cases[] = {
	{ "foreign-thread", test_foreign_thread },
	{ "owner-gone", test_owner_gone },
	{ "close-under-owner", test_close_under_owner },
	{ "fork", test_fork },
	{ "fork-closes", test_fork_closes },
	{ "unshare", test_unshare },
	{ "descriptor-passed", test_descriptor_passed },
	{ "exec", test_exec },
	{ }
};
