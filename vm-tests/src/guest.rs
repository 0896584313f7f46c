//! A guest: Debian's kernel with a busybox in an initramfs, run by a VMM in the host under test.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::KERNEL_ARGUMENTS;
use crate::agent;
use crate::host::Host;
use crate::log::{Line, Log, Mark};
use crate::progress;
use crate::remote::{Process, Remote};

/// Start of the VMM until the agent answers; 6 s on an idle machine.
const BOOT_WITHIN: Duration = Duration::from_secs(150);

/// How a guest gets its USB devices, and from which VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU with `vfio-user-pci` at this socket in the host.
    Qemu {
        /// Path of the vfio-user socket.
        socket: String,
    },
    /// Cloud Hypervisor with `--user-device` at this socket; the binary is the one that `CLOUD_HYPERVISOR` names.
    CloudHypervisor {
        /// Path of the vfio-user socket.
        socket: String,
    },
    /// QEMU's own xHCI and `usb-host`: what we are measured against. Each entry is the value of a `-device usb-host,…`.
    QemuUsbHost {
        /// Properties such as `hostbus=2,hostport=1`.
        devices: Vec<String>,
    },
    /// Cloud Hypervisor without any USB.
    CloudHypervisorPlain,
    /// QEMU without any USB.
    QemuPlain,
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Its name; also the name of the VM in policies and paths.
    pub name: String,
    /// What runs it.
    pub vmm: Vmm,
    /// Its memory.
    pub memory_mib: u32,
    /// More words for its kernel command line.
    pub kernel_arguments: String,
    /// More arguments for its VMM.
    pub vmm_arguments: Vec<String>,
}

impl GuestConfig {
    /// A guest without devices from us.
    pub fn new(name: &str, vmm: Vmm) -> Self {
        Self {
            name: name.to_owned(),
            vmm,
            memory_mib: 384,
            kernel_arguments: String::new(),
            vmm_arguments: Vec::new(),
        }
    }
}

/// Path of the vfio-user socket of a VM in the host, by the convention of our units.
pub fn vfio_socket(vm: &str) -> String {
    format!("/run/usbvfiod/{vm}/vfio.sock")
}

/// A running guest. Dropping it ends its VMM.
pub struct Guest {
    name: String,
    remote: Remote,
    vmm: Process,
    kernel_log: Log,
}

impl Guest {
    /// Starts a guest in a host and waits until it takes commands.
    pub fn start(host: &Host, config: &GuestConfig) -> Result<Self> {
        let guest = Self::launch(host, config)?;
        guest.wait_boot_after(0)?;
        Ok(guest)
    }

    /// Starts a guest and does not wait for it.
    pub fn launch(host: &Host, config: &GuestConfig) -> Result<Self> {
        progress(&format!("starting guest {} ({:?})", config.name, config.vmm));
        let argv = command_line(host, config)?;
        let (vmm, output) = host.remote().spawn_piped(&argv)?;
        host.keep(vmm.log());
        let remote = Remote::new(&format!("guest {}", config.name), output, vmm.input());
        let kernel_log = Log::new(&format!("kernel of guest {}", config.name));
        host.keep(&kernel_log);
        Ok(Self { name: config.name.clone(), remote, vmm, kernel_log })
    }

    /// Waits until it has come up more than `boots` times, and follows its kernel's messages from then on.
    pub fn wait_boot_after(&self, boots: u32) -> Result<()> {
        self.remote
            .wait_boot_after(boots, BOOT_WITHIN)
            .with_context(|| format!("its VMM said:\n{}", self.vmm.log().tail(40)))?;
        progress(&format!("guest {} is up", self.name));
        // Records of /dev/kmsg: `priority,number,time,flags;text`, from the first one that the kernel still has.
        let (_, messages) = self.remote.spawn_piped(&["cat", "/dev/kmsg"])?;
        let log = self.kernel_log.clone();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(messages)).map_while(Result::ok) {
                // Lines that begin with a blank tell the subsystem and device of the record before.
                if let Some((_, text)) = line.split_once(';').filter(|_| !line.starts_with(' ')) {
                    log.push(format!("{text}\n").as_bytes());
                }
            }
        });
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The line to its agent.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Runs a shell script in it that must succeed, and gives what it printed.
    pub fn run(&self, script: &str) -> Result<String> {
        self.remote.run(script)
    }

    /// As [`Self::run`], for what takes long.
    pub fn run_within(&self, script: &str, within: Duration) -> Result<String> {
        self.remote.run_within(script, within)
    }

    /// The process of its VMM in the host.
    pub fn vmm(&self) -> &Process {
        &self.vmm
    }

    /// Its kernel's messages. They come without anybody in the guest touching a device.
    pub fn kernel_log(&self) -> &Log {
        &self.kernel_log
    }

    /// "From now on", for [`Self::wait_line_after`].
    pub fn here(&self) -> Mark {
        self.kernel_log.here()
    }

    /// Waits for a kernel message; `*` in the pattern stands for anything.
    pub fn wait_line(&self, pattern: &str, within: Duration) -> Result<Line> {
        self.kernel_log.wait(pattern, within)
    }

    /// Waits for a kernel message behind `mark`.
    pub fn wait_line_after(&self, mark: Mark, pattern: &str, within: Duration) -> Result<Line> {
        self.kernel_log.wait_after(mark, pattern, within)
    }

    /// Waits until a path exists (or, with `!` before it, no longer exists) in the guest.
    pub fn wait_path(&self, path: &str, within: Duration) -> Result<()> {
        let (negate, path) = path.strip_prefix('!').map_or(("", path), |path| ("! ", path));
        let script = format!("until [ {negate}-e {path} ]; do usleep 20000; done");
        self.run_within(&script, within).map(drop).with_context(|| format!("waiting for {negate}{path}"))
    }

    /// SHA-256 of the first `bytes` of a block device, read past the guest's cache.
    pub fn sha256_of(&self, device: &str, bytes: u64) -> Result<String> {
        let mib = bytes >> 20;
        let script = format!(
            "echo 3 > /proc/sys/vm/drop_caches; dd if={device} bs=1M count={mib} 2>/dev/null | sha256sum | cut -d' ' -f1"
        );
        self.run_within(&script, Duration::from_secs(180))
    }

    /// Restarts its kernel and waits until it takes commands again.
    pub fn reboot(&self) -> Result<()> {
        let boots = self.remote.boots();
        self.remote.spawn(&["reboot", "-f"])?;
        self.wait_boot_after(boots)
    }

    /// Ends its VMM as an operator would: SIGTERM.
    pub fn stop(&self) -> Result<()> {
        if self.vmm.is_running() {
            self.vmm.stop(Signal::SIGTERM, Duration::from_secs(30))?;
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.signal(Signal::SIGKILL);
    }
}

fn command_line(host: &Host, config: &GuestConfig) -> Result<Vec<String>> {
    let kernel = format!("/boot/vmlinuz-{}", host.image().kernel_version);
    let initramfs = "/stage/guest.initramfs";
    let size = format!("{}M", config.memory_mib);
    let arguments = format!("console=ttyS0 {KERNEL_ARGUMENTS} loglevel=4 {}", config.kernel_arguments);
    match &config.vmm {
        vmm @ (Vmm::CloudHypervisor { .. } | Vmm::CloudHypervisorPlain) => {
            if std::env::var_os("CLOUD_HYPERVISOR").is_none() {
                bail!("CLOUD_HYPERVISOR does not name a binary");
            }
            let memory = format!("size={size},shared=on");
            let argv: Vec<String> = words(&[
                "cloud-hypervisor",
                "--kernel",
                &kernel,
                "--initramfs",
                initramfs,
                "--cmdline",
                &arguments,
            ])
            .chain(words(&["--memory", &memory, "--cpus", "boot=1"]))
            .chain(words(&["--serial", "file=/proc/self/fd/2", "--console", "tty"]))
            .chain(usb_arguments(vmm))
            .chain(config.vmm_arguments.iter().cloned())
            .collect();
            // Cloud Hypervisor reads its console from standard input only if that is a terminal.
            let quoted: Vec<String> =
                argv.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
            let inner = format!("stty raw -echo; exec {} 2>&3 3>&-", quoted.join(" "));
            Ok(words(&["sh", "-c", "exec script -qfec \"$1\" /dev/null 3>&2", "cloud-hypervisor", &inner])
                .collect())
        }
        vmm => {
            let memory = format!("memory-backend-memfd,id=ram,size={size},share=on");
            let port = format!("virtserialport,chardev=agent,name={}", agent::PORT_NAME);
            Ok(words(&["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"])
                .chain(words(&["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &size]))
                .chain(words(&["-object", &memory, "-machine", "q35,memory-backend=ram"]))
                .chain(words(&["-kernel", &kernel, "-initrd", initramfs, "-append", &arguments]))
                .chain(words(&[
                    "-chardev",
                    "file,id=console,path=/proc/self/fd/2",
                    "-serial",
                    "chardev:console",
                ]))
                .chain(words(&["-chardev", "stdio,id=agent,signal=off", "-device", "virtio-serial-pci"]))
                .chain(words(&["-device", &port]))
                .chain(usb_arguments(vmm))
                .chain(config.vmm_arguments.iter().cloned())
                .collect())
        }
    }
}

fn words(words: &[&str]) -> impl Iterator<Item = String> {
    words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>().into_iter()
}

fn usb_arguments(vmm: &Vmm) -> Vec<String> {
    match vmm {
        Vmm::Qemu { socket } => {
            let device =
                serde_json::json!({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": socket}});
            words(&["-device", &device.to_string()]).collect()
        }
        Vmm::QemuUsbHost { devices } => words(&["-device", "qemu-xhci,p2=8,p3=8"])
            .chain(devices.iter().flat_map(|device| ["-device".to_owned(), format!("usb-host,{device}")]))
            .collect(),
        Vmm::CloudHypervisor { socket } => words(&["--user-device", &format!("socket={socket}")]).collect(),
        Vmm::QemuPlain | Vmm::CloudHypervisorPlain => Vec::new(),
    }
}
