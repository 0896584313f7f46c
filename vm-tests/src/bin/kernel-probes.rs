//! `kernel-probes`: what usbpolicyd takes for granted of the kernel, each as a small check on this kernel. One line for each:
//! `ID ok|BAD expectation: what was seen`. Runs as root in the host under test.
//!
//! A person, or the scenario, plugs and pulls for it: it says `order plug NAME` or `order pull NAME` and waits for the
//! kernel to see it. A stick goes to socket 4, a keyboard to 5, a hub to 6 of the xHCI whose buses are 1 and 2.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::usbfs::{UrbBuffer, UrbKind, UrbQueue, UsbfsFile};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_tests::gadget::{self, Function, Speed};
use vm_tests::uevents::{self, Group, Listener};

const DEVICES: &str = "/sys/bus/usb/devices";
const STICK: &str = "2-4";
const KEYS: &str = "1-5";
const HUB: &str = "1-6";
const STICK_PORT: u8 = 4;
const KEYS_PORT: u8 = 5;
const HUB_PORT: u8 = 6;
/// The root hubs.
const USB2: &str = "usb1";
const USB3: &str = "usb2";

/// Longest that the kernel or the one who plugs takes.
const WITHIN: Duration = Duration::from_secs(60);

/// A check: its number in the sheet of facts, what is expected, and the check itself, which tells what it saw.
type Probe = (&'static str, &'static str, fn() -> Result<String>);

const PROBES: &[Probe] = &[
    ("T1", "a plug is told as add, change, add of interfaces, bind of interfaces, bind", order_of_events),
    ("T0", "the port of a SuperSpeed stick names its USB 2 half as peer", peers),
    (
        "T2",
        "a claimed port: one claimer, device usable, host drivers only after release and probe",
        claimed_port,
    ),
    ("T3", "dropped privileges refuse what they should, and a reset loses the device to the host", dropped),
    ("T4c", "an occupied port can be claimed; then a reset loses nothing", dropped_on_a_claimed_port),
    ("T6", "claims belong to the open file, duplicates included; no driver comes back by itself", open_files),
    ("T7", "a read-only file shows descriptors; its ioctls are EPERM", read_only),
    ("T8", "uid 1000 without capabilities can do everything, given node and attribute", unprivileged),
    ("T13", "only hubs have ports to claim", no_hub),
    ("T9", "memory for transfers is one pool for all devices", memory),
    ("T10", "a full socket loses events and says so once", overrun),
    ("T4", "authorized=0 revokes nothing, a disabled port or a removed device everything", revocation),
    ("T4e", "a stick on a claimed connector stays without configuration", both_halves),
    ("T5", "an unauthorized device is told by bind; authorizing it is not", unauthorized),
    ("T14", "a claimed port keeps drivers from a device that is authorized later", unauthorized_and_claimed),
    ("T12", "a hub on a claimed port is dead until the port is let go for a moment", hub_on_a_claimed_port),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, node, authorized] = arguments.as_slice()
        && word == "as-nobody"
    {
        return match as_nobody(Path::new(node), Path::new(authorized)) {
            Ok(seen) => {
                println!("{seen}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut all_well = true;
    for (id, expectation, probe) in PROBES {
        let (word, seen) = match probe() {
            Ok(seen) => ("ok", seen),
            Err(error) => ("BAD", format!("{error:#}")),
        };
        all_well &= word == "ok";
        println!("{id:4} {word:3} {expectation}: {seen}");
    }
    println!("probes are over");
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn device(name: &str) -> PathBuf {
    Path::new(DEVICES).join(name)
}

fn text(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("write {value} to {}", path.display()))
}

fn node(name: &str) -> Result<PathBuf> {
    let number = |attribute: &str| Ok::<u32, anyhow::Error>(text(&device(name).join(attribute))?.parse()?);
    Ok(format!("/dev/bus/usb/{:03}/{:03}", number("busnum")?, number("devnum")?).into())
}

fn open(name: &str) -> Result<UsbfsFile> {
    open_node(&node(name)?)
}

fn open_node(node: &Path) -> Result<UsbfsFile> {
    let file = OpenOptions::new().read(true).write(true).open(node);
    Ok(UsbfsFile::new(file.with_context(|| node.display().to_string())?.into())?)
}

/// The driver of the first interface; empty for none.
fn driver(name: &str) -> String {
    let link = fs::read_link(device(&format!("{name}:1.0")).join("driver")).unwrap_or_default();
    link.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn wait_until(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + WITHIN;
    while !holds() {
        ensure!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn wait_driver(name: &str, wanted: &str) -> Result<()> {
    wait_until(&format!("{wanted} at {name}"), || driver(name) == wanted)
}

/// Lets somebody plug a device in; returns when the kernel is done with it.
fn plug(what: &str, name: &str) -> Result<()> {
    println!("order plug {what}");
    wait_until(&format!("{name} to come"), || device(name).join("port").exists())?;
    settle()
}

fn pull(what: &str, name: &str) -> Result<()> {
    println!("order pull {what}");
    wait_until(&format!("{name} to go"), || !device(name).exists())?;
    settle()
}

fn settle() -> Result<()> {
    ensure!(Command::new("udevadm").arg("settle").status()?.success(), "udevadm settle");
    Ok(())
}

/// `drivers_probe`: asks the host's drivers to look at an interface.
fn probe_drivers(name: &str) -> bool {
    fs::write("/sys/bus/usb/drivers_probe", format!("{name}:1.0")).is_ok()
}

/// Checks an outcome and gives a word for it.
fn expect<T>(what: &str, got: nix::Result<T>, wanted: Result<(), Errno>) -> Result<String> {
    let got = got.map(drop);
    ensure!(got == wanted, "{what}: {got:?}, expected {wanted:?}");
    Ok(format!("{what} {}", got.err().map_or("ok".to_owned(), |errno| format!("{errno:?}"))))
}

/// Puts the keyboard back to the state in which the kernel would have it.
fn restore_keys() -> Result<()> {
    probe_drivers(KEYS);
    wait_driver(KEYS, "usbhid")
}

/// What the file says once the device is lost to it. POLLHUP comes with the disconnect, POLLERR a moment later, when the
/// kernel has taken the file off the device's list (`devio.c usbdev_poll`, `usbdev_remove`).
fn wait_hangup(file: &UsbfsFile) -> Result<PollFlags> {
    let look = |timeout: PollTimeout| -> nix::Result<PollFlags> {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::empty())];
        poll(&mut fds, timeout)?;
        Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
    };
    look(PollTimeout::from(10_000_u16))?;
    let lost = PollFlags::POLLHUP | PollFlags::POLLERR;
    wait_until("a hang-up and an error", || look(PollTimeout::ZERO).is_ok_and(|flags| flags.contains(lost)))?;
    Ok(look(PollTimeout::ZERO)?)
}

/// GET_STATUS of the device, which any device answers.
fn get_status(file: &UsbfsFile) -> nix::Result<usize> {
    let mut status = [0; 2];
    file.control_in([0x80, 0, 0, 0, 0, 0, 2, 0], &mut status, Duration::from_secs(2))
}

/// The kernel's events about one device and its interfaces, from the plug to the device's own `bind`.
fn events_until_bind(kernel: &Listener, name: &str) -> Result<Vec<String>> {
    let mut seen: Vec<String> = Vec::new();
    kernel.wait(WITHIN, |event| {
        let (path, action) = (uevents::value(event, "DEVPATH"), uevents::value(event, "ACTION"));
        let (Some(path), Some(action)) = (path, action) else { return false };
        let last = path.rsplit('/').next().unwrap_or_default();
        let kind = uevents::value(event, "DEVTYPE").unwrap_or_default();
        let word = match kind {
            "usb_device" if last == name => action.to_owned(),
            "usb_interface" if last.starts_with(&format!("{name}:")) => format!("{action}-interface"),
            _ => return false,
        };
        let is_last = word == "bind";
        seen.push(word);
        is_last
    })?;
    Ok(seen)
}

fn order_of_events() -> Result<String> {
    // A driver that udev has to load first binds some time after the device's own `bind`.
    ensure!(Command::new("modprobe").arg("usbhid").status()?.success(), "modprobe usbhid");
    let kernel = Listener::new(Group::Kernel, None)?;
    println!("order plug keys");
    let seen = events_until_bind(&kernel, KEYS)?;
    ensure!(seen == ["add", "change", "add-interface", "bind-interface", "bind"], "{seen:?}");
    settle()?;
    Ok(seen.join(", "))
}

fn peers() -> Result<String> {
    plug("stick", STICK)?;
    let peer = fs::read_link(device(STICK).join("port/peer"))?;
    let peer = peer.file_name().context("a link has a name")?.to_string_lossy().into_owned();
    ensure!(peer == format!("{USB2}-port{STICK_PORT}"), "{peer}");
    Ok(format!("{STICK} has {peer}"))
}

fn claimed_port() -> Result<String> {
    let (hub, rival, keys) = (open(USB2)?, open(USB2)?, open(KEYS)?);
    wait_driver(KEYS, "usbhid")?;
    let mut seen = vec![
        expect("claim", hub.claim_port(KEYS_PORT), Ok(()))?,
        expect("second claim", rival.claim_port(KEYS_PORT), Err(Errno::EBUSY))?,
        expect("disconnect", keys.disconnect_driver(0), Ok(()))?,
        expect("set configuration", keys.set_configuration(1), Ok(()))?,
        expect("claim interface", keys.claim_interface(0), Ok(()))?,
        expect("reset", keys.reset(), Ok(()))?,
    ];
    ensure!(driver(KEYS) != "usbhid", "the host driver came back by the reset");
    // The reset dropped the claim of the interface.
    let _ = keys.release_interface(0);
    probe_drivers(KEYS);
    ensure!(driver(KEYS).is_empty(), "a probe got {} on a claimed port", driver(KEYS));
    hub.release_port(KEYS_PORT)?;
    ensure!(driver(KEYS).is_empty(), "the release alone brought {}", driver(KEYS));
    restore_keys()?;
    seen.push("driver back after release and probe".to_owned());
    Ok(seen.join(", "))
}

fn dropped() -> Result<String> {
    let keys = open(KEYS)?;
    keys.drop_privileges(0)?;
    let mut seen = vec![
        expect("disconnect", keys.disconnect_driver(0), Err(Errno::EACCES))?,
        expect("disconnect and claim", keys.disconnect_and_claim(0), Err(Errno::EACCES))?,
        expect("reset under a driver", keys.reset(), Err(Errno::EACCES))?,
        expect("set configuration under a driver", keys.set_configuration(1), Err(Errno::EBUSY))?,
        expect("control transfer", get_status(&keys), Ok(()))?,
    ];
    let other = open(KEYS)?;
    other.disconnect_driver(0)?;
    seen.push(expect("claim outside the mask", keys.claim_interface(0), Err(Errno::EACCES))?);
    other.claim_interface(0)?;
    other.drop_privileges(1)?;
    seen.push(expect("reset with a claim", other.reset(), Ok(()))?);
    // The trap: the reset dropped the claim, and the host driver was quicker.
    wait_driver(KEYS, "usbhid")?;
    seen.push(expect("claim again", other.claim_interface(0), Err(Errno::EBUSY))?);
    Ok(seen.join(", "))
}

fn dropped_on_a_claimed_port() -> Result<String> {
    let (hub, keys) = (open(USB2)?, open(KEYS)?);
    let mut seen = vec![expect("claim of the occupied port", hub.claim_port(KEYS_PORT), Ok(()))?];
    keys.disconnect_driver(0)?;
    keys.claim_interface(0)?;
    keys.drop_privileges(1)?;
    seen.push(expect("reset", keys.reset(), Ok(()))?);
    let again = match keys.claim_interface(0) {
        // Claimed still: nothing was lost either.
        Err(Errno::EBUSY) if driver(KEYS) == "usbfs" => Ok(()),
        other => other,
    };
    seen.push(expect("claim again", again, Ok(()))?);
    drop(keys);
    hub.release_port(KEYS_PORT)?;
    restore_keys()?;
    Ok(seen.join(", "))
}

fn open_files() -> Result<String> {
    let first = open(KEYS)?;
    first.disconnect_driver(0)?;
    first.claim_interface(0)?;
    let duplicate = first.as_fd().try_clone_to_owned()?;
    drop(first);
    let other = open(KEYS)?;
    let mut seen =
        vec![expect("claim while a duplicate lives", other.claim_interface(0), Err(Errno::EBUSY))?];
    drop(duplicate);
    seen.push(expect("claim after the last close", other.claim_interface(0), Ok(()))?);
    drop(other);
    std::thread::sleep(Duration::from_millis(200));
    ensure!(driver(KEYS).is_empty(), "{} came by itself", driver(KEYS));
    seen.push("no driver by itself".to_owned());
    let file = open(KEYS)?;
    seen.push(expect("connect", file.connect_driver(0), Ok(()))?);
    wait_driver(KEYS, "usbhid")?;
    Ok(seen.join(", "))
}

fn read_only() -> Result<String> {
    let node = node(KEYS)?;
    let mut bytes = Vec::new();
    fs::File::open(&node)?.read_to_end(&mut bytes)?;
    ensure!(bytes.len() > 18, "{} bytes of descriptors", bytes.len());
    // USBDEVFS_GET_CAPABILITIES, USBDEVFS_CLAIMINTERFACE, USBDEVFS_RESET by a program that checks nothing first.
    let script = "open(my $f, '<', $ARGV[0]) or die; for (0x8004551a, 0x8004550f, 0x5514) { my $b = \"\\0\" x 8; \
                  print ioctl($f, $_, $b) ? 0 : $!+0, ' ' }";
    let output = Command::new("perl").args(["-e", script]).arg(&node).output()?;
    let errors = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(errors == "1 1 1", "error numbers {errors:?} {}", String::from_utf8_lossy(&output.stderr));
    Ok(format!("{} bytes of descriptors, three ioctls EPERM", bytes.len()))
}

fn unprivileged() -> Result<String> {
    let (node, authorized) = (node(KEYS)?, fs::canonicalize(device(KEYS))?.join("authorized"));
    chown(&node, Some(1000), None)?;
    chown(&authorized, Some(1000), None)?;
    let us = std::env::current_exe()?;
    let identity = ["--reuid", "1000", "--regid", "1000", "--clear-groups"];
    let confined = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"];
    let output = Command::new("setpriv")
        .args(identity)
        .args(confined)
        .arg(us)
        .arg("as-nobody")
        .args([&node, &authorized])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    chown(&node, Some(0), None)?;
    restore_keys()?;
    ensure!(output.status.success(), "{said}");
    Ok(said)
}

fn as_nobody(node: &Path, authorized: &Path) -> Result<String> {
    let keys = open_node(node)?;
    let seen = [
        expect("disconnect", keys.disconnect_driver(0), Ok(()))?,
        expect("claim", keys.claim_interface(0), Ok(()))?,
        expect("reset", keys.reset(), Ok(()))?,
    ];
    drop(keys);
    write(authorized, "0")?;
    write(authorized, "1")?;
    Ok(format!("open ok, {}, authorized ok", seen.join(", ")))
}

fn no_hub() -> Result<String> {
    expect("claim of a port of a keyboard", open(KEYS)?.claim_port(1), Err(Errno::EINVAL))
}

fn memory() -> Result<String> {
    const MIB: usize = 1 << 20;
    const BULK: UrbKind<'_> = UrbKind::Bulk { stream: 0, follows: false };
    let setting = text(Path::new("/sys/module/usbcore/parameters/usbfs_memory_mb"))?;
    ensure!(setting == "16", "usbfs_memory_mb is {setting} here");
    let disk = Path::new("/tmp/probe.img");
    fs::write(disk, vec![0; MIB])?;
    gadget::up("probe", &[Function::Storage(disk.to_owned())], Speed::High)?;
    let other_name = || {
        let entries = fs::read_dir(DEVICES).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names
            .into_iter()
            .find(|name| text(&device(name).join("serial")).is_ok_and(|serial| serial == "probe"))
    };
    wait_until("the gadget", || other_name().is_some_and(|name| driver(&name) == "usb-storage"))?;
    let other_name = other_name().context("the gadget")?;
    let take = |name: &str| -> Result<UrbQueue> {
        let file = open(name)?;
        file.disconnect_driver(0)?;
        file.claim_interface(0)?;
        Ok(UrbQueue::new(file))
    };
    let (mut stick, mut other) = (take(STICK)?, take(&other_name)?);
    // Nothing was asked of either, so nothing comes: the transfers stay.
    let mut submitted = 0;
    while stick.submit(0x81, BULK, MIB, UrbBuffer::Heap(vec![0; MIB])).is_ok() {
        submitted += 1;
        ensure!(submitted < 32, "no end of it");
    }
    let endpoint = fs::read(device(&other_name).join("descriptors"))?;
    // The first bulk IN endpoint: descriptor of 7 bytes, type 5, bit 7 of the address, attributes 2.
    let at = endpoint
        .windows(4)
        .find(|bytes| bytes[0] == 7 && bytes[1] == 5 && bytes[2] & 0x80 != 0 && bytes[3] == 2);
    let endpoint = at.context("no bulk endpoint")?[2];
    let big = other.submit(endpoint, BULK, MIB, UrbBuffer::Heap(vec![0; MIB])).map(drop).map_err(|e| e.errno);
    let small =
        other.submit(endpoint, BULK, 4096, UrbBuffer::Heap(vec![0; 4096])).map(drop).map_err(|e| e.errno);
    drop((stick, other));
    gadget::down("probe")?;
    probe_drivers(STICK);
    ensure!(submitted == 15, "{submitted} transfers of 1 MiB went through");
    let seen =
        [expect("1 MiB elsewhere", big, Err(Errno::ENOMEM))?, expect("4 KiB elsewhere", small, Ok(()))?];
    Ok(format!("{submitted} transfers of 1 MiB, then {}", seen.join(", ")))
}

fn overrun() -> Result<String> {
    let event = uevents::udev_says(&device(USB2))?;
    let mut seen = Vec::new();
    for (buffer, count) in [(None, 3000), (Some(4096), 200)] {
        let listener = Listener::new(Group::Udev, buffer)?;
        uevents::say(&event, count)?;
        let (mut came, mut overruns) = (0, 0);
        loop {
            match listener.take() {
                Ok(Some(_)) => came += 1,
                Ok(None) => break,
                Err(Errno::ENOBUFS) => overruns += 1,
                Err(errno) => bail!("{errno}"),
            }
        }
        ensure!(came > 0 && came < count && overruns == 1, "{came} of {count}, {overruns} times ENOBUFS");
        seen.push(format!("{came} of {count} and one ENOBUFS"));
    }
    Ok(seen.join("; "))
}

fn revocation() -> Result<String> {
    let keys = open(KEYS)?;
    let authorized = device(KEYS).join("authorized");
    write(&authorized, "0")?;
    let mut seen = vec![expect("control after authorized=0", get_status(&keys), Ok(()))?];
    let hangup = {
        let mut fds = [PollFd::new(keys.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO)?
    };
    ensure!(hangup == 0, "authorized=0 hung up");
    write(&authorized, "1")?;
    seen.push(expect("and after authorized=1", get_status(&keys), Ok(()))?);
    wait_driver(KEYS, "usbhid")?;

    // Kept awake: what the kernel finds when it wakes a root hub is not what is asked here.
    let awake = open(USB3)?;
    let stick = open(STICK)?;
    write(&device(STICK).join("port/disable"), "1")?;
    let flags = wait_hangup(&stick)?;
    seen.push(expect("control after disable", get_status(&stick), Err(Errno::ENODEV))?);
    ensure!(flags.contains(PollFlags::POLLHUP | PollFlags::POLLERR), "disable gave {flags:?}");
    let port = device(USB3).join(format!("2-0:1.0/{USB3}-port{STICK_PORT}/disable"));
    write(&port, "0")?;
    // A controller that cannot cut the power of a port, as QEMU's, has no change to tell: the stick is there for the
    // kernel when it is plugged in again.
    pull("stick", STICK)?;
    plug("stick", STICK)?;
    wait_driver(STICK, "usb-storage")?;
    settle()?;
    drop(awake);
    println!("order pull stick");

    let keys = open(KEYS)?;
    write(&device(KEYS).join("remove"), "1")?;
    let flags = wait_hangup(&keys)?;
    seen.push(expect("control after remove", get_status(&keys), Err(Errno::ENODEV))?);
    ensure!(flags.contains(PollFlags::POLLHUP | PollFlags::POLLERR), "remove gave {flags:?}");
    println!("order pull keys");
    wait_until("both to go", || !device(STICK).exists() && !device(KEYS).exists())?;
    Ok(seen.join(", "))
}

fn both_halves() -> Result<String> {
    let (usb2, usb3) = (open(USB2)?, open(USB3)?);
    usb2.claim_port(STICK_PORT)?;
    usb3.claim_port(STICK_PORT)?;
    plug("stick", STICK)?;
    let configuration = text(&device(STICK).join("bConfigurationValue"))?;
    let product = text(&device(STICK).join("product"))?;
    ensure!(configuration.is_empty() && !product.is_empty(), "configuration {configuration:?}, {product:?}");
    let interfaces = device(&format!("{STICK}:1.0")).exists();
    ensure!(!interfaces, "it has interfaces");
    pull("stick", STICK)?;
    Ok(format!("no configuration, no interface, product {product:?} readable"))
}

/// Runs with new devices of the first bus unauthorized.
fn while_unauthorized(body: impl FnOnce() -> Result<String>) -> Result<String> {
    let default = device(USB2).join("authorized_default");
    write(&default, "0")?;
    let outcome = body();
    write(&default, "1")?;
    outcome
}

fn unauthorized() -> Result<String> {
    while_unauthorized(|| {
        let kernel = Listener::new(Group::Kernel, None)?;
        println!("order plug keys");
        let first = events_until_bind(&kernel, KEYS)?;
        settle()?;
        let product = text(&device(KEYS).join("product"))?;
        ensure!(
            !product.is_empty() && !device(&format!("{KEYS}:1.0")).exists(),
            "not as an unauthorized one"
        );
        let kernel = Listener::new(Group::Kernel, None)?;
        write(&device(KEYS).join("authorized"), "1")?;
        wait_driver(KEYS, "usbhid")?;
        settle()?;
        let mut then = Vec::new();
        while let Some(event) = kernel.take()? {
            let path = uevents::value(&event, "DEVPATH").unwrap_or_default();
            if path.ends_with(&format!("/{KEYS}")) {
                then.push(uevents::value(&event, "ACTION").unwrap_or_default().to_owned());
            }
        }
        ensure!(!then.iter().any(|action| action == "bind"), "authorizing gave {then:?}");
        pull("keys", KEYS)?;
        Ok(format!("{}; {product:?} readable; authorizing gave {}", first.join(", "), then.join(", ")))
    })
}

fn unauthorized_and_claimed() -> Result<String> {
    while_unauthorized(|| {
        let hub = open(USB2)?;
        hub.claim_port(KEYS_PORT)?;
        plug("keys", KEYS)?;
        write(&device(KEYS).join("authorized"), "1")?;
        settle()?;
        ensure!(driver(KEYS).is_empty(), "{} has it", driver(KEYS));
        pull("keys", KEYS)?;
        Ok("authorized, and no driver".to_owned())
    })
}

fn hub_on_a_claimed_port() -> Result<String> {
    let root = open(USB2)?;
    root.claim_port(HUB_PORT)?;
    plug("hub", HUB)?;
    let port = device(&format!("{HUB}:1.0")).join(format!("{HUB}-port1"));
    ensure!(!port.exists(), "the hub has ports");
    root.release_port(HUB_PORT)?;
    write(&device(HUB).join("bConfigurationValue"), "1")?;
    wait_until("ports of the hub", || port.exists())?;
    let hub = open(HUB)?;
    let mut seen = vec![
        "no ports".to_owned(),
        expect("claim below it, once configured", hub.claim_port(1), Ok(()))?,
        expect("claim above it again", root.claim_port(HUB_PORT), Ok(()))?,
    ];
    // CLEAR_FEATURE(PORT_POWER) of its second port (USB 2.0 §11.24.2.2): why hubs are never passed on.
    let power_off = hub.control_out([0x23, 1, 8, 0, 2, 0, 0, 0], &[], Duration::from_secs(2));
    seen.push(expect("power off for another port, under the hub driver", power_off, Ok(()))?);
    Ok(seen.join(", "))
}
