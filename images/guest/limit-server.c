/*
 * Starts the echo inside the kernel (kernel/limit), and keeps it going until
 * killed. No thread of this program ever runs for a transaction.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/server.h"

#define MODULE "/mp_limit.ko"
#define DEVICE "/dev/mp_limit"

static void load_module(void)
{
	int fd = open(MODULE, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		server_fail(MODULE, errno);
	if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
		server_fail("loading " MODULE, errno);
	close(fd);
}

static void run(struct server_thread *thread)
{
	int fd;

	load_module();
	fd = open(DEVICE, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		server_fail(DEVICE, errno);
	if (dprintf(fd, "%d", thread->options->port) < 0)
		server_fail(DEVICE, errno);
	server_ready();
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	return server_main_in_kernel(argc, argv, "Echo server: inside the kernel, the limit.", run);
}
