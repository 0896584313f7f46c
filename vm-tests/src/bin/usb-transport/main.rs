//! `usb-transport CHECK DEVICE`: one behaviour of usbvfiod's transport on a real device (`2-1`) of this machine. Prints
//! what it saw; fails with what it did not expect. `tests/scenarios/usb_transport.rs` runs it in the host under test.

mod bench;
mod scripted;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::ids::BusAddress;
use sha2::{Digest, Sha256};
use usbvfiod::urb::{DeviceOp, OpError, TransferKind, UrbStatus};
use usbvfiod::usb::Handover;
use vm_tests::rig::{BULK_IN, BULK_OUT, CBW_AT, CSW_AT, DATA_AT, Rig, Stick, bulk, open_node};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(check), Some(device)) = (arguments.next(), arguments.next()) else {
        bail!("usage: usb-transport CHECK DEVICE, or: usb-transport scripted CHECK")
    };
    match check.as_str() {
        "short-in" => short_in(&device),
        "whole-medium" => whole_medium(&device),
        "stall" => stall(&device),
        "cancel" => cancel(&device),
        "operations" => operations(&device),
        "no-memory" => no_memory(&device),
        "unplug" => unplug(&device),
        "claims" => claims(&device),
        "refusals" => refusals(&device),
        "control" => control(&device),
        "streams" => streams(&device),
        "bench" => bench::compare(&device),
        "bare" => bench::alone(&device, true),
        "alone" => bench::alone(&device, false),
        "scripted" => scripted::check(&device),
        other => bail!("no check is called {other}"),
    }
}

/// What is handed over has to be the device that it is said to be, open for reading and writing.
fn refusals(device: &str) -> Result<()> {
    let mut rig = Rig::new(0)?;
    let (file, told) = open_node(device)?;
    let node = |address: BusAddress| format!("/dev/bus/usb/{:03}/{:03}", address.bus, address.device);
    let open = |path: &str, write: bool| -> Result<OwnedFd> {
        Ok(OpenOptions::new().read(true).write(write).open(path).with_context(|| path.to_owned())?.into())
    };
    let elsewhere = BusAddress { device: told.address.device + 1, ..told.address };
    let root_hub = BusAddress { device: 1, ..told.address };
    let (socket, _peer) = UnixStream::pair()?;
    let cases: Vec<(&str, OwnedFd, Handover)> = vec![
        ("read-only", open(&node(told.address), false)?, told.clone()),
        ("/dev/null", open("/dev/null", true)?, told.clone()),
        ("a regular file", open("/etc/hostname", false)?, told.clone()),
        ("a socket", socket.into(), told.clone()),
        ("another address", file.try_clone()?, Handover { address: elsewhere, ..told.clone() }),
        ("a root hub", open(&node(root_hub), true)?, Handover { address: root_hub, ..told.clone() }),
        ("no such configuration", file.try_clone()?, Handover { configuration: 9, ..told.clone() }),
    ];
    for (what, fd, handover) in cases {
        match rig.attach_file(fd, handover) {
            Ok(_) => bail!("{what} was taken"),
            Err(error) => println!("{what}: {error:#}"),
        }
    }
    rig.attach_file(file, told).context("the device itself")?;
    rig.detach()
}

/// An IN transfer of any length ends with what came, and what did not come stays as it was in memory.
fn short_in(device: &str) -> Result<()> {
    let mut stick = Stick::attach(device, 4096)?;
    println!("{:?}", stick.rig.info()?);
    stick.rig.memory.put(DATA_AT, &[0xee; 255]);
    ensure!(stick.inquiry(36)? == 36);
    ensure!(&stick.rig.memory.get(DATA_AT, 16)[8..12] == b"QEMU");
    ensure!(stick.rig.memory.get(DATA_AT + 36, 4) == [0xee; 4]);

    // More room than the answer needs: the transfer is short and the status after it is not swallowed.
    stick.prepare(&[0x12, 0, 0, 0, 36, 0], 36, true);
    let cbw = stick.rig.submit(BULK_OUT, bulk(), CBW_AT, 31);
    let data = stick.rig.submit(BULK_IN, bulk(), DATA_AT, 4096);
    ensure!(stick.rig.wait(cbw)?.status == UrbStatus::Completed);
    let outcome = stick.rig.wait(data)?;
    ensure!((outcome.status, outcome.actual) == (UrbStatus::Completed, 36), "{outcome:?}");
    let csw = stick.rig.submit_with(BULK_IN, bulk(), &[(CSW_AT as u64, 13)], true);
    let outcome = stick.rig.wait(csw)?;
    ensure!((outcome.status, outcome.actual) == (UrbStatus::Completed, 13), "{outcome:?}");
    ensure!(stick.passed());
    stick.rig.detach()
}

/// Everything on the stick, in transfers of different sizes, several in flight.
fn whole_medium(device: &str) -> Result<()> {
    const CHUNK_BLOCKS: u16 = 4096;
    let mut stick = Stick::attach(device, usize::from(CHUNK_BLOCKS) * 512)?;
    stick.make_ready()?;
    ensure!(stick.read_command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8, 8)? == 8);
    let last = stick.rig.memory.get(DATA_AT, 4);
    let blocks = u32::from_be_bytes([last[0], last[1], last[2], last[3]]) + 1;
    let mut hasher = Sha256::new();
    let pieces = [1 << 20, 2 << 20, 64 * 1024, 16 * 1024, 512, 4096, 120 * 1024];
    let started = Instant::now();
    let mut at = 0;
    for piece in pieces.into_iter().cycle() {
        if at >= blocks {
            break;
        }
        // Not more transfers in flight than the transport takes.
        let count = u16::try_from(blocks - at).unwrap_or(CHUNK_BLOCKS).min(CHUNK_BLOCKS);
        let count = count.min(u16::try_from(piece / 512 * 64).unwrap_or(CHUNK_BLOCKS));
        hasher.update(stick.read(at, count, piece)?);
        at += u32::from(count);
    }
    let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("sha256 {digest}");
    println!("{:?} for {} KiB, {:?}", started.elapsed(), blocks / 2, stick.rig.set.counters());
    stick.rig.detach()
}

/// A transfer that stalls takes those behind it with it, unrun, and the endpoint works after a clear halt.
fn stall(device: &str) -> Result<()> {
    let mut stick = Stick::attach(device, 4096)?;
    stick.prepare(&[0x12, 0, 0, 0, 36, 0], 36, true);
    stick.rig.memory.put(CBW_AT, b"NOPE");
    let bad = stick.rig.submit(BULK_OUT, bulk(), CBW_AT, 31);
    let behind: Vec<_> =
        (0..3).map(|_| stick.rig.submit_with(BULK_OUT, bulk(), &[(CBW_AT as u64, 31)], true)).collect();
    let outcome = stick.rig.wait(bad)?;
    ensure!(outcome.status == UrbStatus::Stalled, "{outcome:?}");
    for id in behind {
        let outcome = stick.rig.wait(id)?;
        ensure!((outcome.status, outcome.actual) == (UrbStatus::NotRun, 0), "{outcome:?}");
    }
    // One more that follows, after the fact: the kernel keeps the endpoint closed.
    let late = stick.rig.submit_with(BULK_OUT, bulk(), &[(CBW_AT as u64, 31)], true);
    ensure!(stick.rig.wait(late)?.status == UrbStatus::NotRun);

    let reset = TransferKind::Control { setup: [0x21, 0xff, 0, 0, 0, 0, 0, 0] };
    let outcome = stick.rig.transfer(0, reset, 0, 0)?;
    ensure!(outcome == (UrbStatus::Completed, 0), "{outcome:?}");
    for endpoint in [BULK_IN, BULK_OUT] {
        ensure!(stick.rig.operate(DeviceOp::ClearHalt { endpoint })? == Ok(()));
    }
    ensure!(stick.inquiry(36)? == 36);
    println!("stalled, recovered");
    stick.rig.detach()
}

/// A keyboard nobody touches: a transfer stays until it is cancelled, however many wait.
fn cancel(device: &str) -> Result<()> {
    let mut rig = Rig::attach(device, 4096)?;
    println!("{:?}", rig.info()?);
    let get_report = [0xa1, 1, 0, 1, 0, 0, 8, 0];
    for _ in 0..50 {
        let ids: Vec<_> = (0..3).map(|_| rig.submit(0x81, TransferKind::Interrupt, 64, 8)).collect();
        let control = rig.submit(0, TransferKind::Control { setup: get_report }, 128, 8);
        rig.cancel(&ids);
        for id in ids {
            let outcome = rig.wait(id)?;
            ensure!(outcome.status == UrbStatus::Cancelled && outcome.actual == 0, "{outcome:?}");
        }
        let outcome = rig.wait(control)?;
        ensure!(outcome.status == UrbStatus::Completed, "{outcome:?}");
    }
    // Idle: the loop sleeps although a transfer is in flight.
    let id = rig.submit(0x81, TransferKind::Interrupt, 64, 8);
    let mut turns = 0;
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        turns += rig.turn(Duration::from_secs(1))?;
    }
    ensure!(turns == 0, "the loop woke {turns} times for nothing");
    rig.perform(usbvfiod::urb::Effect::Abandon { device: usbvfiod::urb::DeviceHandle(1), ids: vec![id] });
    ensure!(rig.wait(id)?.status == UrbStatus::Cancelled);
    println!("cancelled");
    rig.detach()
}

/// Configurations, interfaces and resets; the device works after each.
fn operations(device: &str) -> Result<()> {
    let mut stick = Stick::attach(device, 4096)?;
    let steps: [(DeviceOp, Result<(), OpError>); 9] = [
        (DeviceOp::SetConfiguration { value: 1 }, Ok(())),
        (DeviceOp::SetConfiguration { value: 1 }, Ok(())),
        (DeviceOp::SetInterface { interface: 0, alternate: 0 }, Ok(())),
        (DeviceOp::SetInterface { interface: 0, alternate: 9 }, Err(OpError::Stalled)),
        (DeviceOp::SetInterface { interface: 9, alternate: 0 }, Err(OpError::Stalled)),
        (DeviceOp::ClearHalt { endpoint: 0x85 }, Err(OpError::Stalled)),
        (DeviceOp::SetConfiguration { value: 7 }, Err(OpError::Stalled)),
        (DeviceOp::Reset, Ok(())),
        (DeviceOp::Reset, Ok(())),
    ];
    for (op, expected) in steps {
        let started = Instant::now();
        let result = stick.rig.operate(op.clone())?;
        println!("{op:?}: {result:?} in {:?}", started.elapsed());
        ensure!(result == expected, "{op:?}: {result:?}, not {expected:?}");
        ensure!(stick.inquiry(36)? == 36);
    }
    ensure!(stick.rig.operate(DeviceOp::SetConfiguration { value: 0 })? == Ok(()));
    let outcome = stick.rig.transfer(BULK_IN, bulk(), DATA_AT, 36)?;
    ensure!(outcome.0 == UrbStatus::TransactionError, "an unconfigured device has no endpoints: {outcome:?}");
    ensure!(stick.rig.operate(DeviceOp::SetConfiguration { value: 1 })? == Ok(()));
    ensure!(stick.inquiry(36)? == 36);

    // A reset ends what is in flight as cancelled, before its own outcome.
    stick.prepare(&[0x12, 0, 0, 0, 36, 0], 36, true);
    let cbw = stick.rig.submit(BULK_OUT, bulk(), CBW_AT, 31);
    ensure!(stick.rig.wait(cbw)?.status == UrbStatus::Completed);
    let reset = stick.rig.start_operation(DeviceOp::Reset);
    let queued =
        stick.rig.submit(0, TransferKind::Control { setup: [0x80, 6, 0, 1, 0, 0, 18, 0] }, DATA_AT, 18);
    ensure!(stick.rig.wait_operation(reset)? == Ok(()));
    ensure!(stick.rig.wait(queued)?.status == UrbStatus::Completed);
    ensure!(stick.inquiry(36)? == 36);
    stick.rig.detach()
}

/// Less usbfs memory than the transfers want: they wait, none fails, and all bytes come.
fn no_memory(device: &str) -> Result<()> {
    let mut stick = Stick::attach(device, 8 << 20)?;
    stick.make_ready()?;
    let mut hasher = Sha256::new();
    for block in [0_u32, 8192] {
        // Eight transfers of 512 KiB where the kernel allows 1 MiB in all.
        hasher.update(stick.read(block, 8192, 512 << 10)?);
    }
    let counters = stick.rig.set.counters();
    println!("{counters:?}");
    ensure!(counters.waits_for_memory > 0, "there was memory enough, nothing is shown");
    let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("sha256 of 8 MiB {digest}");
    stick.rig.detach()
}

/// Pulled while transfers are in flight: each has its outcome, and the loop is told once.
fn unplug(device: &str) -> Result<()> {
    let mut stick = Stick::attach(device, 1 << 20)?;
    stick.make_ready()?;
    println!("reading");
    std::io::stdout().flush()?;
    let until = Instant::now() + Duration::from_secs(20);
    let error = loop {
        ensure!(Instant::now() < until, "never pulled");
        if let Err(error) = stick.read(0, 2048, 128 << 10) {
            break error;
        }
    };
    println!("the read ended with {error:#}");
    stick.rig.turn_until(|rig| rig.gone)?;
    let late = stick.rig.transfer(BULK_IN, bulk(), DATA_AT, 512)?;
    ensure!(late == (UrbStatus::Gone, 0), "{late:?}");
    ensure!(stick.rig.operate(DeviceOp::Reset)? == Err(OpError::Gone));
    ensure!(stick.rig.set.is_quiet(), "something is still in flight");
    println!("gone");
    stick.rig.detach()
}

/// A device that its host driver uses is taken from it; nobody else can have it then; a close gives it up.
fn claims(device: &str) -> Result<()> {
    let driver = || -> Option<String> {
        let link = std::fs::read_link(format!("/sys/bus/usb/devices/{device}:1.0/driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    };
    println!("driver before: {:?}", driver());
    let first = Rig::attach(device, 64)?;
    ensure!(driver().as_deref() == Some("usbfs"), "{:?}", driver());
    let second = Rig::attach(device, 64).err().context("two cannot have it")?;
    println!("second: {second:#}");
    first.detach()?;
    ensure!(driver().is_none(), "{:?}", driver());
    Rig::attach(device, 64)?.detach()
}

/// Control transfers whose data stage is shorter than they say, longer than a page, absent.
fn control(device: &str) -> Result<()> {
    let mut rig = Rig::attach(device, 128 << 10)?;
    let get = |length: u16| {
        let [low, high] = length.to_le_bytes();
        TransferKind::Control { setup: [0x80, 6, 0, 1, 0, 0, low, high] }
    };
    ensure!(rig.transfer(0, get(18), 0, 18)? == (UrbStatus::Completed, 18));
    let descriptor = rig.memory.get(0, 18);
    ensure!(descriptor[..2] == [18, 1]);
    ensure!(rig.transfer(0, get(255), 0, 255)? == (UrbStatus::Completed, 18));
    // QEMU's devices take no more.
    ensure!(rig.transfer(0, get(4096), 0, 4096)? == (UrbStatus::Completed, 18));
    ensure!(rig.transfer(0, get(0), 0, 0)? == (UrbStatus::Completed, 0));
    // Room for 8 bytes only, where the device sends 18.
    rig.memory.put(0, &[0xee; 32]);
    ensure!(rig.transfer(0, get(18), 0, 8)? == (UrbStatus::Babble, 8));
    ensure!(rig.memory.get(0, 8) == descriptor[..8] && rig.memory.get(8, 8) == [0xee; 8]);
    // Memory that is not there.
    ensure!(rig.transfer(0, get(18), 1 << 40, 18)? == (UrbStatus::GuestMemory, 18));
    // No such descriptor.
    let none = TransferKind::Control { setup: [0x80, 6, 0, 0x77, 0, 0, 18, 0] };
    ensure!(rig.transfer(0, none, 0, 18)?.0 == UrbStatus::Stalled);
    let set_address = TransferKind::Control { setup: [0, 5, 9, 0, 0, 0, 0, 0] };
    ensure!(rig.transfer(0, set_address, 0, 0)?.0 == UrbStatus::TransactionError);
    ensure!(rig.transfer(0, get(18), 0, 18)? == (UrbStatus::Completed, 18));
    println!("control transfers work");
    rig.detach()
}

/// QEMU's UAS disk at SuperSpeed: commands on two streams at once, answered out of order or not, each in its place.
fn streams(device: &str) -> Result<()> {
    const COMMAND: u8 = 0x01;
    const STATUS: u8 = 0x82;
    const DATA_IN: u8 = 0x83;
    const DATA_OUT: u8 = 0x04;
    let mut rig = Rig::attach(device, 1 << 20)?;
    println!("{:?}", rig.info()?);
    let endpoints = vec![STATUS, DATA_IN, DATA_OUT];
    ensure!(
        rig.operate(DeviceOp::AllocStreams { endpoints: endpoints.clone(), streams: 16 })? == Ok(()),
        "no streams"
    );
    let send = |rig: &mut Rig, tag: u16, cdb: &[u8], len: u32| {
        let mut iu = vec![1, 0];
        iu.extend(tag.to_be_bytes());
        iu.resize(16, 0);
        iu.extend(cdb);
        iu.resize(32, 0);
        let place = usize::from(tag) * 0x10000;
        rig.memory.put(place, &iu);
        let stream = TransferKind::Bulk { stream: tag };
        let data = (len > 0).then(|| rig.submit(DATA_IN, stream.clone(), place + 0x1000, len));
        let status = rig.submit(STATUS, stream, place + 0x100, 96);
        (rig.submit(COMMAND, bulk(), place, 32), status, data, place)
    };
    // What it wants to tell after a reset.
    for tag in 1..4 {
        let (command, status, _, _) = send(&mut rig, tag, &[0; 6], 0);
        ensure!(rig.wait(command)?.status == UrbStatus::Completed);
        ensure!(rig.wait(status)?.status == UrbStatus::Completed);
    }
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let capacity = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for round in 0..8 {
        let first = send(&mut rig, 5 + round % 4, &inquiry, 36);
        let second = send(&mut rig, 10 + round % 4, &capacity, 8);
        for ((command, status, data, place), len) in [(first, 36), (second, 8)] {
            ensure!(rig.wait(command)?.status == UrbStatus::Completed);
            let data = rig.wait(data.context("a command with data")?)?;
            ensure!((data.status, data.actual) == (UrbStatus::Completed, len), "{data:?}");
            let outcome = rig.wait(status)?;
            let iu = rig.memory.get(place + 0x100, 16);
            ensure!(outcome.status == UrbStatus::Completed && iu[0] == 3 && iu[6] == 0, "{outcome:?} {iu:?}");
            let tag = u16::from_be_bytes([iu[2], iu[3]]);
            ensure!(usize::from(tag) * 0x10000 == place, "status of command {tag} at {place:#x}");
        }
    }
    // A stream that nothing comes on is cancelled alone.
    let idle = rig.submit(STATUS, TransferKind::Bulk { stream: 15 }, 0, 96);
    rig.cancel(&[idle]);
    ensure!(rig.wait(idle)?.status == UrbStatus::Cancelled);
    ensure!(rig.operate(DeviceOp::FreeStreams { endpoints: endpoints.clone() })? == Ok(()));
    // A guest's array for 16 streams has room for 31.
    ensure!(rig.operate(DeviceOp::AllocStreams { endpoints, streams: 31 })? == Ok(()), "a guest's array");
    println!("streams work");
    rig.detach()
}
