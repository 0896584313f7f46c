//! `make demo`: a stick is plugged into a virtual host and appears in a guest, by policy; every step is shown.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vm_tests::scenarios::Client;
use vm_tests::{Guest, Host, HostConfig, Mark, UsbDevice, Usbpolicyd, Usbvfiod};

const POLICY: &str = r#"schema = 1

[vms.vm1]

[[assign]]
vm    = "vm1"
match = { at = "pci-0000:00:10.0/usb3:1", id = "46f4:*" }
"#;

/// Tells each step and how long it took since the start.
struct Tale {
    start: Instant,
    step: u32,
}

impl Tale {
    fn step(&mut self, what: &str) {
        self.step += 1;
        println!("\n[{:5.1} s] {}. {what}", self.start.elapsed().as_secs_f32(), self.step);
    }
}

fn show(text: &str) {
    for line in text.lines() {
        println!("              {line}");
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    vm_tests::binaries::directory()?;
    let _slot = vm_tests::slots::Slot::acquire()?;
    // The image is made before the clock starts: that happens once.
    vm_tests::image::Image::get()?;
    let mut tale = Tale { start: Instant::now(), step: 0 };
    tale.step("A virtual host with a USB 3 controller boots Debian's kernel");
    let host = Host::boot(&HostConfig::default())?;
    let outcome = tell(&mut tale, &host);
    if outcome.is_err() {
        eprintln!("{}", host.report());
    }
    outcome
}

fn tell(tale: &mut Tale, host: &Host) -> Result<()> {
    show(&host.run("uname -sr; lspci -nn 2>/dev/null | grep -i usb || true")?);

    tale.step("usbpolicyd starts with this policy: what is plugged into one port goes to one VM");
    show(POLICY);
    let policy = Usbpolicyd::start(host, POLICY)?;

    tale.step("usbvfiod starts for vm1, confined, and QEMU starts the guest with its controller");
    let controller = Usbvfiod::start(host, "vm1")?;
    let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
    show(&guest.wait_line("xhci_hcd*hci version*", Duration::from_secs(30))?.text);

    tale.step("A stick is plugged into the host: the event");
    let decisions = policy.log().here();
    let before = guest.here();
    let on_host = host.console().here();
    let plugged = Instant::now();
    let stick = host.plug(UsbDevice::stick("stick1"))?;
    show(&host.console().wait_after(on_host, "usb 2-1: new SuperSpeed", Duration::from_secs(20))?.text);

    tale.step("usbpolicyd decides and hands the open device to usbvfiod");
    let seen = guest.wait_line_after(before, "new SuperSpeed*USB device", Duration::from_secs(30))?;
    show(&policy.log().all_after(decisions, "").join("\n"));
    show(&controller.log().all_after(Mark::START, "ttach").join("\n"));
    show(&host.run("usbpolicyctl list")?);

    tale.step("The guest has it");
    show(&seen.text);
    println!("              {:.0?} from the plug to this line", seen.at.duration_since(plugged));
    let disk = guest.wait_disk(&stick)?;
    show(&guest.wait_line_after(before, "Attached SCSI", Duration::from_secs(30))?.text);

    tale.step("The guest reads all of it");
    let reading = Instant::now();
    let sum = guest.sha256_of(&disk, stick.size_bytes())?;
    ensure!(sum == stick.sha256(), "SHA-256 read in the guest {sum}, of the stick {}", stick.sha256());
    println!("              SHA-256 of the stick   {}", stick.sha256());
    println!("              SHA-256 in the guest   {sum}");
    println!(
        "              {} MiB in {:.1?}, on emulated processors",
        stick.size_bytes() >> 20,
        reading.elapsed()
    );

    tale.step("The stick is pulled: nobody in the guest touches it, the guest is told");
    let (before, decisions) = (guest.here(), policy.log().here());
    let pulled = Instant::now();
    host.unplug(&stick)?;
    let seen = guest.wait_line_after(before, "USB disconnect", Duration::from_secs(20))?;
    show(&seen.text);
    println!("              {:.0?} from the pull to this line", seen.at.duration_since(pulled));
    guest.wait_path(&format!("!{disk}"), Duration::from_secs(60)).context("the disk stays in the guest")?;
    show(&policy.log().all_after(decisions, "").join("\n"));

    guest.stop()?;
    controller.stop()?;
    policy.stop()?;
    println!(
        "\n[{:5.1} s] done: every step was seen, both daemons ended cleanly",
        tale.start.elapsed().as_secs_f32()
    );
    Ok(())
}
