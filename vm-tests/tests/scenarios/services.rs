//! The Debian package on a host that runs systemd: its users, udev rule and units, and a stick that goes the whole way
//! through services that have no more rights than their units leave them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm_tests::{
    Guest, GuestConfig, Host, HostConfig, Plugged, Process, UsbDevice, Vmm, binaries, progress, scenario,
};

const POLICY: &str = "schema = 1\n[vms.vm1]\n[[assign]]\nname = \"stick\"\nvm = \"vm1\"\nmode = \"required\"\n\
                      match = { id = \"46f4:0001\" }\n";

/// Longest step, on a machine that is busy with other things.
const WITHIN: Duration = Duration::from_secs(240);

/// Units of a whole system that need a minute under emulation and have nothing to do with us. The host under test runs
/// udev and has its file systems already.
const MASKED: &[&str] = &[
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-network-generator.service",
    "systemd-pcrmachine.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
];

/// systemd as the first process of a PID namespace: the host's own first process is the harness's agent.
struct Systemd<'a> {
    host: &'a Host,
    _process: Process,
}

impl<'a> Systemd<'a> {
    fn start(host: &'a Host) -> Result<Self> {
        progress("starting systemd");
        let masks = format!(
            "cd /etc/systemd/system && for unit in {}; do ln -sf /dev/null $unit; done\n\
             printf '[Unit]\\nRequires=sysinit.target\\nAfter=sysinit.target\\n' > test.target",
            MASKED.join(" ")
        );
        host.remote().run_within(&masks, WITHIN)?;
        let process = host.spawn(&[
            "unshare",
            "--fork",
            "--pid",
            "--mount-proc",
            "env",
            "container=vm-tests",
            "/usr/lib/systemd/systemd",
            "--system",
            "--unit=test.target",
            "--log-target=console",
            "--log-color=no",
            "--show-status=no",
        ])?;
        let systemd = Self { host, _process: process };
        let private = "until [ -S /run/systemd/private ]; do sleep 0.2; done";
        host.remote().run_within(private, WITHIN).context("systemd does not come up")?;
        systemd.run("until systemctl is-active --quiet test.target; do sleep 0.5; done")?;
        Ok(systemd)
    }

    /// Runs a shell script among its processes: systemd answers nobody else.
    fn run(&self, script: &str) -> Result<String> {
        self.enter(script).map_err(|error| {
            let journal = self.enter("journalctl --no-pager --lines 60 --output cat").unwrap_or_default();
            error.context(format!("`{script}`; the journal:\n{journal}"))
        })
    }

    fn enter(&self, script: &str) -> Result<String> {
        self.host.remote().write_file("/root/script", script.as_bytes())?;
        let enter = "PATH=/usr/sbin:/usr/bin:/sbin:/bin nsenter --pid --mount \
             --target \"$(pgrep --oldest --full '^/usr/lib/systemd/systemd --system')\" sh -e /root/script";
        self.host.remote().run_within(enter, WITHIN)
    }
}

/// Builds the package from the programs under test.
fn package() -> Result<(String, Vec<u8>)> {
    progress("building the Debian package");
    let output = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/deb/build.sh");
    let built = Command::new(&script).arg(output.path()).env("PROGRAMS", binaries::directory()?).output()?;
    ensure!(built.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&built.stderr));
    let packages: Vec<PathBuf> =
        std::fs::read_dir(output.path())?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let [path] = packages.as_slice() else { anyhow::bail!("one package expected: {packages:?}") };
    let name = path.file_name().and_then(|name| name.to_str()).context("name of the package")?;
    Ok((name.to_owned(), std::fs::read(path)?))
}

fn install(systemd: &Systemd<'_>) -> Result<()> {
    let (name, package) = package()?;
    systemd.host.remote().write_file(&format!("/root/{name}"), &package)?;
    progress("installing the Debian package");
    systemd.run(&format!("dpkg --install /root/{name}"))?;
    Ok(())
}

#[test]
fn installed_services_give_a_stick_to_a_guest() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let systemd = Systemd::start(host)?;
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        host.kernel_name(&stick)?;
        install(&systemd)?;
        // The package's own trigger gave what was plugged in before to usbpolicyd.
        host.run("udevadm settle")?;
        let owners = host.run("stat --format %U /dev/bus/usb/*/*")?;
        ensure!(owners.lines().all(|owner| owner == "usbpolicyd"), "{owners}");

        host.remote().write_file("/etc/usbpolicyd/policy.toml", POLICY.as_bytes())?;
        systemd.run("usbpolicyctl check\nsystemctl enable --now usbpolicyd")?;
        systemd.run("systemctl enable --now usbvfiod@vm1.socket\nsystemctl start usbvfiod@vm1.service")?;
        for unit in ["usbpolicyd.service", "usbvfiod@vm1.service"] {
            let status = systemd
                .run(&format!("cat /proc/$(systemctl show --property MainPID --value {unit})/status"))?;
            ensure!(status.contains("CapBnd:\t0000000000000000"), "{unit}: {status}");
            ensure!(status.contains("CapEff:\t0000000000000000"), "{unit}: {status}");
            ensure!(status.contains("NoNewPrivs:\t1"), "{unit}: {status}");
            ensure!(status.contains("Seccomp:\t2"), "{unit}: {status}");
            ensure!(!status.contains("Uid:\t0\t"), "{unit}: {status}");
        }
        let nice = systemd
            .run("awk '{print $19}' /proc/$(systemctl show --property MainPID --value usbpolicyd)/stat")?;
        ensure!(nice == "-10", "usbpolicyd runs at {nice}");
        let sockets = host.run(
            "stat --format '%a %G' /run/usbvfiod/vm1.sock /run/usbvfiod/vm1/policy.sock /run/usbvfiod/vm1",
        )?;
        ensure!(sockets == "660 usbvfiod\n660 usbpolicyd\n755 usbpolicyd", "{sockets}");

        progress("what the VM requires, and nobody may see who is in no group");
        systemd.run("systemctl start usbpolicyd-wait@vm1.service\nusbpolicyctl vm wait vm1 --timeout 0")?;
        systemd.run(
            "test \"$(stat --format '%a %U' /run/usbpolicyd/events.sock)\" = '666 root'\n\
             ! setpriv --reuid 4242 --regid 4242 --clear-groups usbpolicyctl vm wait vm1 --timeout 0",
        )?;
        the_journal_has_the_fields_of_an_attach(&systemd)?;

        let vmm = Vmm::Qemu { socket: "/run/usbvfiod/vm1.sock".to_owned() };
        let guest = Guest::start(host, &GuestConfig::new("vm1", vmm))?;
        guest.check_content(&stick)?;

        progress("killing usbpolicyd; systemd starts it again, and a question asked meanwhile is answered");
        let with_vm1 = "until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done";
        systemd.run(&format!(
            "systemctl kill --signal KILL usbpolicyd\nusbpolicyctl list | grep 46f4:0001\n{with_vm1}"
        ))?;
        guest.check_content(&stick)?;
        a_daemon_that_stands_still_is_started_again(&systemd, &guest, &stick)?;
        a_confined_file_survives_resets_and_its_port_stays_claimed(&systemd, &guest, &stick)?;

        progress("a bad policy is a failed reload and changes nothing");
        host.remote().write_file("/etc/usbpolicyd/policy.toml", b"schema = 1\nassing = []\n")?;
        systemd.run(&format!("if systemctl reload usbpolicyd; then exit 1; fi\n{with_vm1}"))?;

        progress("stopping the instance; the host gets its stick back");
        guest.stop()?;
        systemd.run(
            "systemctl stop usbvfiod@vm1.service\n\
             test -S /run/usbvfiod/vm1.sock\n\
             test ! -e /run/usbvfiod/vm1\n\
             until ls -d /sys/bus/usb/drivers/usb-storage/*:1.0; do sleep 0.5; done",
        )?;
        a_device_that_is_not_given_back_is_cut_off_at_its_port(&systemd, &stick)?;
        systemd.run("dpkg --remove usbpolicyd\n! systemctl is-active usbpolicyd")?;
        Ok(())
    })
}

/// What happened is found by its fields, as an operator would look for it.
fn the_journal_has_the_fields_of_an_attach(systemd: &Systemd<'_>) -> Result<()> {
    let entry = systemd
        .run("journalctl --no-pager --output json --lines 1 USB_EVENT=attached USB_VM=vm1 USB_RULE=stick")?;
    for field in ["\"MESSAGE_ID\"", "\"USB_UID\"", "\"USB_CONNECTOR\":\"pci-", "\"USB_ACTOR\":\"policy\""] {
        ensure!(entry.contains(field), "no {field} in {entry}");
    }
    Ok(())
}

/// The watchdog of the unit as it is installed. The daemon is stopped as a whole: what stands still for any other reason
/// does not tell systemd that it is alive either.
fn a_daemon_that_stands_still_is_started_again(
    systemd: &Systemd<'_>,
    guest: &Guest,
    stick: &Plugged,
) -> Result<()> {
    progress(
        "stopping usbpolicyd in its tracks; the watchdog ends it, another starts, and the guest notices nothing",
    );
    let (since, mark) = (guest.here(), systemd.host.console().here());
    let status = systemd.run("systemctl show --property StatusText --value usbpolicyd")?;
    ensure!(status.contains("1 with VMs, 1 VMs up"), "{status}");
    systemd.run(
        "of() { systemctl show --property $1 --value usbpolicyd; }\n\
         stopped=$(of MainPID); restarts=$(of NRestarts)\n\
         kill -STOP $stopped\n\
         if usbpolicyctl list 2> /root/said; then exit 1; fi\n\
         grep 'usbpolicyd does not answer; is it stopped?' /root/said\n\
         until [ $(of NRestarts) -gt $restarts ]; do sleep 0.5; done\n\
         until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         test $(of MainPID) != $stopped",
    )?;
    systemd.host.console().wait_after(mark, "*usbpolicyd.service: Watchdog timeout*", WITHIN)?;
    let gone = guest.kernel_log().all_after(since, "USB disconnect");
    ensure!(gone.is_empty(), "the guest lost its stick: {gone:?}");
    guest.check_content(stick)
}

/// A device on a claimed port is handed over by a file that cannot take it from host drivers. Each reset makes the
/// kernel drop the claims of its interfaces; the guest must not notice, also when no rule claims the port any more.
fn a_confined_file_survives_resets_and_its_port_stays_claimed(
    systemd: &Systemd<'_>,
    guest: &Guest,
    stick: &Plugged,
) -> Result<()> {
    progress("handing the stick over by a file that cannot detach drivers");
    let by_port = POLICY.replace("id = \"46f4:0001\"", &format!("at = \"{}\"", stick.connector()));
    let reload = |policy: &str| -> Result<String> {
        systemd.host.remote().write_file("/etc/usbpolicyd/policy.toml", policy.as_bytes())?;
        systemd.run("usbpolicyctl reload")
    };
    let claimed = "usbpolicyctl status --json | grep -A1 claimed_ports | grep -e -port";
    reload(&by_port)?;
    systemd.run(&format!("until {claimed}; do sleep 0.5; done"))?;
    // The file it has was made before the port was claimed: give it another one.
    systemd.run(
        "usbpolicyctl vm drain vm1\nuntil usbpolicyctl list | grep -q 'which is paused'; do sleep 0.5; done\n\
         usbpolicyctl vm resume vm1\nuntil usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         grep '\"confined\":true' /run/usbpolicyd/given.json",
    )?;
    guest.check_content(stick)?;
    the_claims_outlive_a_crash(systemd, guest)?;
    guest.check_content(stick)?;
    progress("the rule that claims the port goes; the guest resets the stick");
    reload(POLICY)?;
    systemd.run(&format!("sleep 1; {claimed}"))?;
    guest.reboot()?;
    guest.check_content(stick)?;
    let log = systemd.run("usbpolicyctl log")?;
    ensure!(!log.contains("let go by usbvfiod"), "{log}");
    Ok(())
}

/// The files of the hubs stay with systemd, and their claims with them. A claim that is not taken over shows: nobody
/// else can claim the port then, so the next usbpolicyd would have none.
fn the_claims_outlive_a_crash(systemd: &Systemd<'_>, guest: &Guest) -> Result<()> {
    progress(
        "killing usbpolicyd; it takes over the claimed ports that systemd keeps, and the guest notices nothing",
    );
    let since = guest.here();
    systemd.run(
        "kept() { systemctl show --property NFileDescriptorStore --value usbpolicyd; }\n\
         before=$(kept); test \"$before\" -ge 2\n\
         claimed() { usbpolicyctl status --json | grep -A4 claimed_ports | grep -o 'usb[0-9]*-port[0-9]*' | sort; }\n\
         claimed > /root/before; test -s /root/before\n\
         systemctl kill --signal KILL usbpolicyd\n\
         until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         until claimed > /root/after; cmp /root/before /root/after; do sleep 0.5; done\n\
         test \"$(kept)\" = \"$before\"\n\
         usbpolicyctl log | grep adopted\n\
         grep '\"confined\":true' /run/usbpolicyd/given.json\n\
         ! journalctl --no-pager --unit usbpolicyd | grep 'cannot take over'",
    )?;
    let gone = guest.kernel_log().all_after(since, "USB disconnect");
    ensure!(gone.is_empty(), "the guest lost its stick: {gone:?}");
    Ok(())
}

/// An instance that is stopped in its tracks keeps nothing: the port is switched, by the service that may.
fn a_device_that_is_not_given_back_is_cut_off_at_its_port(
    systemd: &Systemd<'_>,
    stick: &Plugged,
) -> Result<()> {
    progress("an instance that does not answer; without the service the operator is told of it");
    let policy = POLICY.replace("[[assign]]", "[defaults]\non_release = \"deauthorize\"\n[[assign]]");
    systemd.host.remote().write_file("/etc/usbpolicyd/policy.toml", policy.as_bytes())?;
    systemd.run(
        "usbpolicyctl reload\nsystemctl start usbvfiod@vm1.service\n\
         until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         systemctl kill --signal STOP usbvfiod@vm1.service\n\
         usbpolicyctl revoke 46f4:0001\n\
         until usbpolicyctl log | grep 'enable --now usbpolicyd-sysfs.socket'; do sleep 0.5; done\n\
         usbpolicyctl list | grep STUCK",
    )?;
    let name = systemd.host.kernel_name(stick)?;
    systemd.run(&format!(
        "systemctl enable --now usbpolicyd-sysfs.socket\n\
         number=$(cat /sys/bus/usb/devices/{name}/devnum)\n\
         usbpolicyctl revoke 46f4:0001\n\
         until usbpolicyctl log | grep 'its port was switched off and on'; do sleep 0.5; done\n\
         test \"$(cat /sys/bus/usb/devices/{name}/devnum)\" != $number"
    ))?;
    println!("{}", systemd.run("usbpolicyctl log; usbpolicyctl list --long; usbpolicyctl orders")?);
    systemd.run("systemctl kill --signal CONT usbvfiod@vm1.service")?;

    progress("a device that is deauthorized after its VM, and authorized for it");
    systemd.host.unplug(stick)?;
    systemd.host.replug(stick)?;
    let name = systemd.host.kernel_name(stick)?;
    systemd.run(&format!(
        "usbpolicyctl clear --all\nuntil usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         systemctl stop usbvfiod@vm1.service\n\
         until [ $(cat /sys/bus/usb/devices/{name}/authorized) = 0 ]; do sleep 0.5; done\n\
         systemctl start usbvfiod@vm1.service\n\
         until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done\n\
         test $(cat /sys/bus/usb/devices/{name}/authorized) = 1"
    ))?;
    Ok(())
}
