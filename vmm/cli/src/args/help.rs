//! What `--help` says after the options.

pub(crate) const RUN_EXAMPLES: &str = "\
Examples:
  godwit run --name web --kernel vmlinux --initrd initrd --memory 512M --cpus 2
  godwit run --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda' --disk id=root,path=root.img
  godwit run --kernel vmlinux --initrd initrd --vsock cid=3,uds=/run/web.vsock
  godwit run --kernel vmlinux --initrd initrd --net tap=tap0 --net id=lan,tap=tap1,mac=02:00:00:00:00:07
  godwit run --kernel vmlinux --initrd initrd --console virtio --port agent=/run/web.agent
  godwit run --kernel vmlinux --initrd initrd --cpus 4 --net tap=tap0,queues=4,bandwidth=50MB/s
  godwit run --config-file vm.json --name web --detach && godwit logs web --follow

A tap is made before: ip tuntap add dev tap0 mode tap && ip link set dev tap0 up; with `mode tap multi_queue` for a card
with several queues. Without mac= a network card has a random address. fd=3 or fd=[3,4] instead of tap= are descriptors of
a tap's queues that were open before.
The guest prints on either console; what is typed comes to the one that has the terminal.
In a terminal, Ctrl-] asks the guest to shut down (ACPI power button); a second Ctrl-] ends it at once.
Exit codes: 0 the guest powered itself off or reset, was stopped, has moved or is in a snapshot; 1 failed; 2 bad usage;
4 the guest panicked (pvpanic) or ended with a triple fault.";

pub(crate) const RECEIVE_EXAMPLES: &str = "\
Examples:
  godwit receive --name web --listen tcp:0.0.0.0:7000
  godwit receive --listen unix:/run/web.migrate --disk root=/dev/vg0/web --net net0=tap0 --vsock uds=/run/web.vsock
  godwit receive --listen tcp:0.0.0.0:7000 --port agent=/run/web.agent";

pub(crate) const RESTORE_EXAMPLES: &str = "\
Examples:
  godwit restore web.snapshot --name web --resume
  godwit restore web.snapshot --disk root=clone-1.img --net net0=tap1 --name clone-1 --resume
  godwit restore web.snapshot --prefetch --resume
  godwit restore web.snapshot --preload --resume
  godwit restore web.snapshot --uffd web.handler --resume

The snapshot is only read, and must stay as long as a guest runs from it without --preload; with --prefetch until
`godwit status` shows no more memory that comes. With --uffd a page-fault
handler listens at the socket (Firecracker's protocol); when it hangs up, the VM ends with an error. Any number of guests
can run from one snapshot, each with disks and taps of its own; their network cards have the same address. Its clocks
go on from now, and its generation ID is new: Linux then takes new random numbers.";

pub(crate) const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  godwit snapshot web web.snapshot
  godwit pause web; godwit snapshot web web.snapshot --keep-running; cp web.img clone.img; godwit resume web
  godwit snapshot web web.snapshot --keep-running --live
  godwit snapshot web monday --keep-running
  godwit snapshot web tuesday --diff --keep-running
  godwit snapshot merge monday tuesday --output whole

With --live the guest stands still for about a millisecond (0.3 ms more for each GiB), and what it writes while its memory
is copied waits for the copy. That is no base for --diff, and no way to copy disks that the guest writes to. With --keep-running alone the pages that the guest writes from then on are logged, which
costs it a fault for each, and small pages. A migration ends that: the next snapshot must be a whole one.
Ctrl-C cancels: the guest runs on. Losing this command in another way does not.
Disks are not part of it: whoever lets the guest run on copies them while it is paused.
Exit codes: 0 the snapshot is complete; 1 failed, there is none, and the guest runs on; 2 bad usage.";

pub(crate) const DISK_EXAMPLES: &str = "\
Examples:
  truncate --size 20G web.img && godwit disk web root";

pub(crate) const BALLOON_EXAMPLES: &str = "\
Examples:
  godwit balloon web 256M
  godwit balloon web 0M
  godwit balloon web --json

The guest gives up, or takes back, in its own time. It drops caches and swaps for it; one that runs out of memory takes
some back by itself, unless its configuration file says deflate_on_oom false.";

pub(crate) const MIGRATE_EXAMPLES: &str = "\
Examples:
  godwit migrate web tcp:host-b:7000
  godwit migrate web tcp:10.0.0.2:7000 --max-downtime 20ms --deadline 30s --on-miss switch
  godwit migrate web tcp:10.0.0.2:7000 --bandwidth 500MB/s --final-bandwidth 1GiB/s --streams 4
  godwit migrate web unix:/run/web.migrate --verify --json

Rates are SIZE/s: MB are millions of bytes, MiB (or M) 1048576.
Ctrl-C cancels: the guest runs on here. Losing this command in another way does not.
Exit codes: 0 moved; 1 failed, and the guest runs where it ran; 2 bad usage; 3 in doubt.";

pub(crate) const REPORT_EXAMPLES: &str = "\
Examples:
  godwit migrate web tcp:host-b:7000 --trace web.trace
  godwit report web.trace --output web.html
  godwit report web.trace > web.svg";

pub(crate) const RESOLVE_HELP: &str = "\
A migration is in doubt when the source has said \"go\" and does not know what came of it. At the source:
  godwit resolve web              ask the destination and do what follows from its answer
  godwit resolve web --discard    the guest runs there, I know: throw the paused copy here away
  godwit resolve web --run        it does not run there and never will, I know: run it here
The destination is asked in any case, and what it says counts more than --run or --discard.

At a receiver that has a complete machine while its source is gone for good, --run and --discard decide.
A VM in doubt ends neither by `godwit stop` nor by one signal: `godwit stop --force` throws its copy away.
Exit codes: 0 settled; 1 refused, or settled otherwise than asked for; 2 bad usage; 3 still in doubt.";
