//! Checks against devices that do exactly what the check says (`usbip-device`, started from here).

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use usbvfiod::urb::{DeviceOp, OpError, TransferKind, UrbStatus};
use vm_tests::rig::{Rig, bulk};
use vm_tests::usbip::models::counted::{SINK, SOURCE, check_stream, fill_stream, packet};

/// A device says what is asked of it; one that the kernel does not take says nothing.
const SPEAKS_WITHIN: Duration = Duration::from_secs(10);

/// One of them, by name.
pub(crate) fn check(name: &str) -> Result<()> {
    match name {
        "bulk" => bulk_streams(),
        "faults" => faults(),
        "lies" => lies(),
        "identity" => identity(),
        "isochronous" => isochronous(),
        "silent-operation" => silent_operation(),
        "neighbours" => neighbours(),
        "uas-hidden" => uas_hidden(),
        other => bail!("no check is called {other}"),
    }
}

/// A device in `vhci_hcd`; pulled when dropped.
struct Scripted {
    child: Child,
    orders: ChildStdin,
    said: Receiver<String>,
    /// Its name in sysfs.
    name: String,
}

impl Scripted {
    fn plug(arguments: &[&str]) -> Result<Self> {
        let mut child = Command::new("usbip-device")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("usbip-device")?;
        let orders = child.stdin.take().context("a pipe")?;
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        let (to, said) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| to.send(line)));
        let mut device = Self { child, orders, said, name: String::new() };
        let configured = device.wait_for("configured")?;
        device.name = configured["device"].as_str().context("a name")?.to_owned();
        Ok(device)
    }

    fn wait_for(&mut self, event: &str) -> Result<Value> {
        loop {
            let line =
                self.said.recv_timeout(SPEAKS_WITHIN).with_context(|| format!("wait for `{event}`"))?;
            let said: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
            if said["event"] == event {
                return Ok(said);
            }
        }
    }

    fn order(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}")?;
        ensure!(self.wait_for("order")?["known"] == true, "{order}");
        Ok(())
    }

    fn statistics(&mut self) -> Result<Value> {
        writeln!(self.orders, "stats")?;
        Ok(self.wait_for("stats")?["stats"]["device"]["model"].clone())
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Numbered bytes both ways, eight transfers in flight, of lengths that end anywhere.
fn bulk_streams() -> Result<()> {
    const SLOT: usize = 300 * 1024;
    const DEPTH: usize = 8;
    let mut device = Scripted::plug(&["bulk", "--speed", "super"])?;
    let mut rig = Rig::attach(&device.name, DEPTH * SLOT)?;
    let lengths =
        [1_usize, 13, 512, 1024, 4096, 65536, 100_000, 7, 300 * 1024, 31].into_iter().cycle().take(120);

    let mut at = 0;
    let mut flying = VecDeque::new();
    for (index, len) in lengths.clone().map(Some).chain([None; DEPTH]).enumerate() {
        if flying.len() == DEPTH || len.is_none() {
            let Some((id, place, asked)) = flying.pop_front() else { break };
            let outcome = rig.wait(id)?;
            ensure!(
                (outcome.status, outcome.actual as usize) == (UrbStatus::Completed, asked),
                "{outcome:?}"
            );
            let came = rig.memory.get(place, asked);
            ensure!(check_stream(at, &came).0 == 0, "wrong bytes from {at}");
            at += asked as u64;
        }
        if let Some(len) = len {
            let place = index % DEPTH * SLOT;
            flying.push_back((submit(&mut rig, SOURCE, place, len, index > 0)?, place, len));
        }
    }
    println!("{at} bytes came");

    let mut sent = 0;
    for (index, len) in lengths.map(Some).chain([None; DEPTH]).enumerate() {
        if flying.len() == DEPTH || len.is_none() {
            let Some((id, _, asked)) = flying.pop_front() else { break };
            let outcome = rig.wait(id)?;
            ensure!(
                (outcome.status, outcome.actual as usize) == (UrbStatus::Completed, asked),
                "{outcome:?}"
            );
        }
        if let Some(len) = len {
            let place = index % DEPTH * SLOT;
            let mut bytes = vec![0; len];
            fill_stream(sent, &mut bytes);
            rig.memory.put(place, &bytes);
            flying.push_back((submit(&mut rig, SINK, place, len, index > 0)?, place, len));
            sent += len as u64;
        }
    }
    let statistics = device.statistics()?;
    println!("{sent} bytes sent: {statistics}");
    ensure!(statistics["sunk"] == sent && statistics["wrong"] == 0, "{statistics}");
    rig.detach()
}

fn submit(
    rig: &mut Rig,
    endpoint: u8,
    place: usize,
    len: usize,
    follows: bool,
) -> Result<usbvfiod::urb::TransferId> {
    Ok(rig.submit_with(endpoint, bulk(), &[(place as u64, u32::try_from(len)?)], follows))
}

/// Each kind of trouble has its name, and what is queued behind it does not run.
fn faults() -> Result<()> {
    let mut device = Scripted::plug(&["identity", "--speed", "super"])?;
    let mut rig = Rig::attach(&device.name, 4096)?;
    let cases = [
        ("babble", UrbStatus::Babble),
        ("broken", UrbStatus::TransactionError),
        ("stall", UrbStatus::Stalled),
        ("none", UrbStatus::Completed),
    ];
    for (fault, expected) in cases {
        device.order("data silence")?;
        let first = rig.submit(0x81, bulk(), 0, 512);
        let behind = rig.submit_with(0x81, bulk(), &[(1024, 512)], true);
        let other = rig.submit(0x02, bulk(), 2048, 512);
        rig.turn(Duration::from_millis(50))?;
        device.order(&format!("data {fault}"))?;
        let outcome = rig.wait(first)?;
        println!("{fault}: {:?}, {} bytes", outcome.status, outcome.actual);
        ensure!(outcome.status == expected, "{fault}: {outcome:?}");
        let outcome = rig.wait(behind)?;
        let not_run = if fault == "none" { UrbStatus::Completed } else { UrbStatus::NotRun };
        ensure!(outcome.status == not_run, "behind {fault}: {outcome:?}");
        let outcome = rig.wait(other)?;
        ensure!(fault == "babble" || outcome.status == expected, "other endpoint, {fault}: {outcome:?}");
        for endpoint in [0x81, 0x02] {
            ensure!(rig.operate(DeviceOp::ClearHalt { endpoint })? == Ok(()));
        }
    }
    // Silence, then a cancel; and a clear halt that has to cancel first.
    device.order("data silence")?;
    let silent = rig.submit(0x81, bulk(), 0, 512);
    rig.turn(Duration::from_millis(50))?;
    rig.cancel(&[silent]);
    ensure!(rig.wait(silent)?.status == UrbStatus::Cancelled);
    let silent = rig.submit(0x81, bulk(), 0, 512);
    ensure!(rig.operate(DeviceOp::ClearHalt { endpoint: 0x81 })? == Ok(()));
    ensure!(rig.wait(silent)?.status == UrbStatus::Cancelled);
    // A client that vanishes: everything ends at once, and nothing is written any more.
    rig.memory.put(0, &[0xee; 512]);
    let silent = rig.submit(0x81, bulk(), 0, 512);
    rig.quiesce();
    device.order("data none")?;
    ensure!(rig.wait(silent)?.status == UrbStatus::Cancelled);
    rig.turn_until(|rig| rig.set.is_quiet())?;
    ensure!(rig.memory.get(0, 512) == [0xee; 512], "guest memory was touched");
    rig.detach()
}

/// Descriptors that lie: taken or refused, and either way nobody is hurt.
fn lies() -> Result<()> {
    for lie in [
        "total-length-huge",
        "total-length-small",
        "length-zero",
        "length-one",
        "length-beyond-end",
        "interfaces-255",
        "endpoints",
        "superspeed-lies",
        "missing-configurations",
    ] {
        let device =
            Scripted::plug(&[lie, "--speed", if lie == "superspeed-lies" { "super" } else { "high" }]);
        let Ok(device) = device else {
            println!("{lie}: the kernel does not take it");
            continue;
        };
        match Rig::attach(&device.name, 65536) {
            Ok(mut rig) => {
                let get = TransferKind::Control { setup: [0x80, 6, 0, 2, 0, 0, 0xff, 0xff] };
                let outcome = rig.transfer(0, get, 0, 65535)?;
                println!("{lie}: taken, configuration descriptor {outcome:?}");
                rig.detach()?;
            }
            Err(error) => println!("{lie}: {error:#}"),
        }
    }
    Ok(())
}

/// A device that comes back from a reset as another one is gone.
fn identity() -> Result<()> {
    let mut device = Scripted::plug(&["identity"])?;
    let mut rig = Rig::attach(&device.name, 64)?;
    ensure!(rig.operate(DeviceOp::Reset)? == Ok(()));
    device.order("new-identity")?;
    let result = rig.operate(DeviceOp::Reset)?;
    ensure!(result == Err(OpError::Gone), "{result:?}");
    rig.turn_until(|rig| rig.gone)?;
    println!("gone after a reset with another identity");
    rig.detach()
}

/// Numbered packets both ways, several intervals in a transfer, three transfers ahead.
fn isochronous() -> Result<()> {
    const PACKETS: usize = 32;
    const LEN: u32 = 192;
    const AHEAD: usize = 3;
    const TRANSFERS: usize = 40;
    let total = LEN * PACKETS as u32;
    let mut device = Scripted::plug(&["isochronous", "--speed", "high"])?;
    let mut rig = Rig::attach(&device.name, AHEAD * total as usize)?;
    ensure!(rig.operate(DeviceOp::SetInterface { interface: 0, alternate: 1 })? == Ok(()));
    let kind = || TransferKind::Isochronous { packets: vec![LEN; PACKETS] };
    let mut expected = 0;
    let mut flying = VecDeque::new();
    for index in 0..TRANSFERS + AHEAD {
        if flying.len() == AHEAD {
            let Some((id, place)) = flying.pop_front() else { break };
            let outcome = rig.wait(id)?;
            ensure!(
                outcome.status == UrbStatus::Completed && outcome.packets.len() == PACKETS,
                "{outcome:?}"
            );
            for (number, result) in outcome.packets.iter().enumerate() {
                ensure!(result.status == UrbStatus::Completed && result.actual == LEN, "{result:?}");
                let came = rig.memory.get(place + number * LEN as usize, LEN as usize);
                ensure!(came == packet(expected, LEN as usize), "packet {expected} is wrong");
                expected += 1;
            }
        }
        if index < TRANSFERS {
            let place = index % AHEAD * total as usize;
            flying.push_back((rig.submit(SOURCE, kind(), place, total), place));
        }
    }
    println!("{expected} packets came");

    let mut number = 0;
    for index in 0..TRANSFERS + AHEAD {
        if flying.len() == AHEAD {
            let Some((id, _)) = flying.pop_front() else { break };
            let outcome = rig.wait(id)?;
            ensure!(
                outcome.packets.iter().all(|packet| packet.status == UrbStatus::Completed),
                "{outcome:?}"
            );
        }
        if index < TRANSFERS {
            let place = index % AHEAD * total as usize;
            for slot in 0..PACKETS {
                rig.memory.put(place + slot * LEN as usize, &packet(number, LEN as usize));
                number += 1;
            }
            flying.push_back((rig.submit(SINK, kind(), place, total), place));
        }
    }
    while let Some((id, _)) = flying.pop_front() {
        rig.wait(id)?;
    }
    let statistics = device.statistics()?;
    println!("{number} packets sent: {statistics}");
    let sink = &statistics["sink"];
    ensure!(sink["received"] == number, "{statistics}");
    for wrong in ["missing", "disordered", "corrupt", "empty"] {
        ensure!(sink[wrong] == 0, "{statistics}");
    }
    rig.detach()
}

/// A device that never answers: the operation fails in time for the guest, the late result is dropped, and the device
/// is used again afterwards.
fn silent_operation() -> Result<()> {
    let mut device = Scripted::plug(&["identity"])?;
    let mut rig = Rig::attach(&device.name, 4096)?;
    device.order("control silence")?;
    let started = Instant::now();
    let operation = rig.start_operation(DeviceOp::ClearHalt { endpoint: 0x81 });
    let waiting = rig.submit(0x81, bulk(), 0, 512);
    let cancelled = rig.submit(0x02, bulk(), 0, 512);
    rig.cancel(&[cancelled]);
    ensure!(rig.wait(cancelled)?.status == UrbStatus::Cancelled);
    ensure!(started.elapsed() < Duration::from_secs(3), "a transfer that waits is cancelled at once");
    ensure!(rig.wait_operation(operation)? == Err(OpError::Failed));
    let answered = started.elapsed();
    ensure!((3400..4800).contains(&answered.as_millis()), "answered after {answered:?}");
    device.order("control none")?;
    let outcome = rig.wait(waiting)?;
    println!(
        "operation answered after {answered:?}, transfer behind it {:?} after {:?}",
        outcome.status,
        started.elapsed()
    );
    ensure!(outcome.status == UrbStatus::Completed, "{outcome:?}");
    ensure!(rig.operate(DeviceOp::ClearHalt { endpoint: 0x81 })? == Ok(()));
    rig.detach()
}

/// While one device lets the kernel wait for 5 s, another one is served as before, and the loop never stops.
fn neighbours() -> Result<()> {
    let slow = Scripted::plug(&["identity", "--delay-set-interface", "4500"])?;
    let fast = Scripted::plug(&["bulk", "--speed", "super"])?;
    let mut rig = Rig::attach(&slow.name, 65536)?;
    let slow_handle = usbvfiod::urb::DeviceHandle(1);
    let fast_handle = rig.attach_another(&fast.name)?;
    let round = |rig: &mut Rig, time: Duration| -> Result<(u32, Duration)> {
        let until = Instant::now() + time;
        let (mut count, mut worst) = (0, Duration::ZERO);
        while Instant::now() < until {
            let started = Instant::now();
            ensure!(rig.transfer(SOURCE, bulk(), 0, 4096)?.0 == UrbStatus::Completed);
            worst = worst.max(started.elapsed());
            count += 1;
        }
        Ok((count, worst))
    };
    round(&mut rig, Duration::from_millis(500))?;
    let alone = round(&mut rig, Duration::from_secs(2))?;
    rig.select(slow_handle);
    let started = Instant::now();
    let operation = rig.start_operation(DeviceOp::SetInterface { interface: 0, alternate: 0 });
    rig.select(fast_handle);
    let beside = round(&mut rig, Duration::from_secs(2))?;
    println!("alone {alone:?}, beside a device that hangs {beside:?}");
    let result = rig.wait_operation(operation)?;
    println!("SET_INTERFACE: {result:?} after {:?}", started.elapsed());
    ensure!(started.elapsed() > Duration::from_secs(3), "it did not hang, nothing is shown");
    // A loop that waits with the hanging device would be stopped for seconds. The rates themselves are for a person to
    // read: a busy machine changes them more than the neighbour may.
    ensure!(beside.1 < Duration::from_secs(2) && beside.0 * 3 > alone.0, "{alone:?} {beside:?}");
    rig.detach()
}

/// No streams on this host: the guest sees bulk-only storage where the device also has UAS.
fn uas_hidden() -> Result<()> {
    let device = Scripted::plug(&["uas-choice", "--speed", "super"])?;
    let mut rig = Rig::attach(&device.name, 4096)?;
    ensure!(rig.info()?.uas_hidden, "{:?}", rig.info()?);
    let get = TransferKind::Control { setup: [0x80, 6, 0, 2, 0, 0, 0xff, 0] };
    let (status, len) = rig.transfer(0, get, 0, 255)?;
    ensure!(status == UrbStatus::Completed);
    let bytes = rig.memory.get(0, len as usize);
    let classes: Vec<_> =
        bytes.windows(9).filter(|w| w[..2] == [9, 4]).map(|w| (w[3], w[5], w[6], w[7])).collect();
    println!("the guest sees {classes:?}");
    ensure!(classes == [(0, 8, 6, 0x50), (1, 8, 6, 0xff)], "{classes:?}");
    let head = TransferKind::Control { setup: [0x80, 6, 0, 2, 0, 0, 9, 0] };
    ensure!(rig.transfer(0, head, 0, 9)? == (UrbStatus::Completed, 9));
    rig.detach()
}
