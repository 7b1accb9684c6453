"""The script that an emulated board runs as its first process, and the parser of its report.

It is a shell script for busybox, which needs little memory. It starts each command with an empty page cache, samples
MemAvailable meanwhile, and then reads the peak and the OOM killer's victims from the kernel.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

SAMPLE_SECONDS = 0.2

# Ports: 1 stdout, 2 stderr, 3 the script's report, one line for each event. After each command a line with a mark goes
# to ports 1 and 2, where this machine splits them.
SUPERVISOR = """\
export PATH=/srv/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/busybox
/bin/busybox mount -t tmpfs -o size=64M run /run
/bin/busybox mkdir /run/busybox
/bin/busybox --install -s /run/busybox
mount -t proc proc /proc
mount -t sysfs sys /sys
chmod 1777 /tmp
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o size=64M shm /dev/shm
mount -t devpts pts /dev/pts
ln -sf /proc/self/fd /dev/fd
for each in 0:stdin 1:stdout 2:stderr; do ln -sf "/proc/self/fd/${each%:*}" "/dev/${each#*:}"; done
hostname board
ip link set lo up 2>/dev/null || ifconfig lo up
exec 3>"$(echo /dev/vport*p3)" 4>"$(echo /dev/vport*p1)" 5>"$(echo /dev/vport*p2)"
[ ! -f /srv/prepare ] || . /srv/prepare
kills() { while read -r name count; do [ "$name" = oom_kill ] && echo "$count"; done </proc/vmstat; }
sample() {
  read -r now idle </proc/uptime
  while read -r name size unit; do
    [ "$name" != MemTotal: ] || total=$size
    [ "$name" != MemAvailable: ] || { echo "memory $now $total $size" >&3; return; }
  done </proc/meminfo
}
for job in /srv/jobs/*; do
  dmesg -c >/dev/null
  sync
  echo 3 >/proc/sys/vm/drop_caches
  before=$(kills)
  read -r now idle </proc/uptime
  echo "start $now" >&3
  sample
  cd /root
  rm -f /run/peak
  /usr/bin/time -f %M -o /run/peak sh "$job/command" <"$job/stdin" >&4 2>&5 3>&- 4>&- 5>&- &
  pid=$!
  while kill -0 $pid 2>/dev/null; do sample; sleep SAMPLE; done
  wait $pid
  status=$?
  dmesg | sed -n 's/.*Out of memory: Killed process /victim /p' >&3
  read -r now idle </proc/uptime
  peak=$(sed -n '$p' /run/peak)
  echo "end $now $status ${peak:-0} $(($(kills) - before))" >&3
  echo "MARK" >&4
  echo "MARK" >&5
done
sync
poweroff -f
"""


@dataclass(frozen=True)
class GuestCommand:
    """A program to run on the board, as root, in /root."""

    arguments: tuple[str, ...]
    stdin: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def script(self) -> str:
        """A shell script that becomes the program by exec, so that the measured peak is the program's."""
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        return "".join([*exports, f"exec {shlex.join(self.arguments)}\n"])


@dataclass(frozen=True)
class CommandOutcome:
    """The result of one command, as the board's kernel reports it."""

    exit_status: int
    """128 + N after signal N; 137 after the OOM killer."""
    stdout: str
    stderr: str
    seconds: float
    """Seconds of the board's clock; it is emulated, so they say nothing about a real board."""
    peak_rss_bytes: int
    """The largest resident set of the program or of a child that it waited for: ru_maxrss."""
    total_bytes: int
    """MemTotal: the memory without the kernel's own part."""
    available_bytes: int
    """The least MemAvailable while the command ran: memory left to other programs, page cache included."""
    available: tuple[tuple[float, int], ...]
    """(seconds since the start, MemAvailable), about five samples a second."""
    oom_victims: tuple[str, ...]
    """The kernel's log line for each process that the OOM killer ended."""

    @property
    def oom(self) -> bool:
        """Did the kernel run out of memory?"""
        return bool(self.oom_victims)


def supervisor_script(mark: str) -> str:
    """The script with `mark`, a line that no program prints."""
    return SUPERVISOR.replace("SAMPLE", f"{SAMPLE_SECONDS:g}").replace("MARK", mark)


def parse_outcomes(report: str, stdout: str, stderr: str, mark: str) -> list[CommandOutcome]:
    """One outcome for each command that ended."""
    ends = [text.split(f"{mark}\n") for text in (stdout, stderr)]
    runs = re.findall(r"(?ms)^start (\S+)\n(.*?)^end (\S+) (\d+) (\d+) (\d+)$", report)
    return [
        _outcome(float(start), body, (float(end), int(status), int(peak), int(kills)), ends[0][n], ends[1][n])
        for n, (start, body, end, status, peak, kills) in enumerate(runs)
    ]


def _outcome(
    start: float, body: str, end: tuple[float, int, int, int], stdout: str, stderr: str
) -> CommandOutcome:
    samples = [tuple(map(float, sample)) for sample in re.findall(r"(?m)^memory (\S+) (\d+) (\d+)$", body)]
    victims: Sequence[str] = re.findall(r"(?m)^victim (.*)$", body)
    ended, status, peak, kills = end
    # The counter proves the OOM; the kernel's log only names the process.
    victims = [*victims, *["a process that the kernel's log does not name"] * kills][: max(kills, 0)]
    return CommandOutcome(
        exit_status=status,
        stdout=stdout,
        stderr=stderr,
        seconds=ended - start,
        peak_rss_bytes=peak * 1024,
        total_bytes=int(samples[0][1]) * 1024,
        available_bytes=int(min(available for _, _, available in samples)) * 1024,
        available=tuple((now - start, int(available) * 1024) for now, _, available in samples),
        oom_victims=tuple(victims),
    )
