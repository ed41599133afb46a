// SPDX-License-Identifier: GPL-2.0
/* What all other cases have left behind. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "test.h"

static struct {
	int sockets;
	int references;		/* to the module */
} at_start;

static int number_after(const char *path, const char *before)
{
	FILE *file = fopen(path, "re");
	char line[256];
	int number = -1;

	while (file && fgets(line, sizeof(line), file)) {
		const char *at = strstr(line, before);

		if (!at)
			continue;
		number = atoi(at + strlen(before));
		break;
	}
	if (file)
		fclose(file);
	return number;
}

static int tcp_sockets(void)
{
	return number_after("/proc/net/sockstat", "TCP: inuse ");
}

static int module_references(void)
{
	FILE *file = fopen("/proc/modules", "re");
	char line[256];
	int number = -1;

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "megapipe %*d %d", &number) == 1)
			break;
	if (file)
		fclose(file);
	return number;
}

static void test_nothing_left(void)
{
	TRUE(at_start.sockets >= 0 && at_start.references >= 0);
	for (int i = 0; i < 300; i++) {
		if (tcp_sockets() <= at_start.sockets &&
		    module_references() <= at_start.references)
			return;
		sleep_ms(10);
	}
	fail("expected %d sockets and %d references to the module, as before, found %d and %d",
	     at_start.sockets, at_start.references, tcp_sockets(), module_references());
}

static void test_kmemleak(void)
{
	int fd = open("/sys/kernel/debug/kmemleak", O_RDWR | O_CLOEXEC);
	char text[4096], *found;
	ssize_t length;

	if (fd < 0)
		return;		/* not this kernel */
	sleep_ms(6000);		/* younger objects do not count */
	for (int i = 0; i < 2; i++)
		MUST(write(fd, "scan", 4));
	length = read(fd, text, sizeof(text) - 1);
	if (length <= 0)
		return;
	text[length] = '\0';
	found = strstr(text, "megapipe");
	if (found)
		fail("kmemleak: %.300s", text);
}

void note_start(void)
{
	at_start.sockets = tcp_sockets();
	at_start.references = module_references();
}

const struct test_case leftovers_cases[] = {
	{ "nothing-left", test_nothing_left },
	{ "kmemleak", test_kmemleak },
	{ }
};
