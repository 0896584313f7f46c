//! The Debian package on a host that runs systemd: its users, udev rule and units, and a stick that goes the whole way
//! through services that have no more rights than their units leave them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm_tests::{Guest, GuestConfig, Host, HostConfig, Process, UsbDevice, Vmm, binaries, progress, scenario};

const POLICY: &str = "schema = 1\n[vms.vm1]\n[[assign]]\nvm = \"vm1\"\nmatch = { id = \"46f4:0001\" }\n";

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
        let sockets = host.run(
            "stat --format '%a %G' /run/usbvfiod/vm1.sock /run/usbvfiod/vm1/policy.sock /run/usbvfiod/vm1",
        )?;
        ensure!(sockets == "660 usbvfiod\n660 usbpolicyd\n755 usbpolicyd", "{sockets}");

        let vmm = Vmm::Qemu { socket: "/run/usbvfiod/vm1.sock".to_owned() };
        let guest = Guest::start(host, &GuestConfig::new("vm1", vmm))?;
        guest.check_content(&stick)?;

        progress("killing usbpolicyd; systemd starts it again");
        let with_vm1 = "until usbpolicyctl list | grep -q 'with vm1'; do sleep 0.5; done";
        systemd.run(&format!("systemctl kill --signal KILL usbpolicyd\n{with_vm1}"))?;
        guest.check_content(&stick)?;

        progress("a bad policy is a failed reload and changes nothing");
        host.remote().write_file("/etc/usbpolicyd/policy.toml", b"schema = 1\nassing = []\n")?;
        systemd.run(&format!("! systemctl reload usbpolicyd\n{with_vm1}"))?;

        progress("stopping the instance; the host gets its stick back");
        guest.stop()?;
        systemd.run(
            "systemctl stop usbvfiod@vm1.service\n\
             test -S /run/usbvfiod/vm1.sock\n\
             test ! -e /run/usbvfiod/vm1\n\
             until ls -d /sys/bus/usb/drivers/usb-storage/*:1.0; do sleep 0.5; done",
        )?;
        systemd.run("dpkg --remove usbpolicyd\n! systemctl is-active usbpolicyd")?;
        Ok(())
    })
}
