//! What a scenario asks of devices in a guest: is the stick there, is it whole, does the keyboard type.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::devices::Plugged;
use crate::guest::Guest;
use crate::log::Mark;
use crate::progress;
use crate::remote::Process;

/// A question after a failure; a guest that hangs must not hold up the report.
const ASK_WITHIN: Duration = Duration::from_secs(20);
/// From the plug until the guest has a block device: enumeration, the second that usb-storage waits, SCSI.
const DISK_WITHIN: Duration = Duration::from_secs(120);
/// How long a guest may take to let a device go that it knows to have left.
const GONE_WITHIN: Duration = Duration::from_secs(30);

/// A copy in a guest that runs.
pub struct Copy {
    process: Process,
}

impl Copy {
    /// The SHA-256 of what was copied, or the status and the words of the copy if it failed.
    pub fn finish(&self, within: Duration) -> Result<String> {
        let ended = self.process.wait(within)?;
        let sum = String::from_utf8_lossy(&self.process.take_stdout()).trim().to_owned();
        ensure!(
            ended == crate::Ended::Status(0),
            "the copy ended with {ended:?}:\n{}",
            self.process.log().tail(5)
        );
        Ok(sum)
    }

    /// Whether it has neither succeeded nor failed yet.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }
}

/// Reads key presses in a guest.
pub struct Keys {
    process: Process,
}

impl Keys {
    /// What was typed since the reader was started, as pairs of key code (linux/input-event-codes.h) and state (1 down, 0 up).
    pub fn finish(&self, within: Duration) -> Result<Vec<(u16, u32)>> {
        self.process.wait(within)?;
        let records = self.process.take_stdout();
        // struct input_event of linux/input.h: 16 bytes of time, type, code, value.
        let decoded = records.chunks_exact(24).map(|record| {
            let half = |at: usize| u16::from_le_bytes([record[at], record[at + 1]]);
            (half(16), half(18), u32::from(half(20)))
        });
        // EV_KEY is 1; the rest are scan codes and ends of reports.
        Ok(decoded.filter(|(kind, ..)| *kind == 1).map(|(_, code, value)| (code, value)).collect())
    }
}

impl Guest {
    /// Opens the keyboard that comes (or has come) behind `mark` and reads until `count` keys went down and up.
    pub fn read_keys(&self, mark: Mark, count: usize) -> Result<Keys> {
        let line = self.wait_line_after(mark, "input: *Keyboard as /", Duration::from_secs(30))?;
        let input = line.text.rsplit('/').next().unwrap_or_default();
        // For each key, down and up: scan code, key, end of report.
        let script = format!(
            "until event=$(ls -d /sys/class/input/{input}/event*); do usleep 20000; done 2>/dev/null; \
             exec 3</dev/input/${{event##*/}}; echo open >&2; exec dd bs=24 count={} <&3",
            6 * count
        );
        let process = self.remote().spawn(&["sh", "-c", &script])?;
        process.log().wait("open", Duration::from_secs(10))?;
        Ok(Keys { process })
    }

    /// The block device of a stick, found by its serial number; waits until the guest has made it.
    pub fn wait_disk(&self, stick: &Plugged) -> Result<String> {
        let serial = stick.device.serial_number();
        let script = format!(
            "while :; do for place in /sys/bus/usb/devices/*; do \
               [ \"$(cat $place/serial 2>/dev/null)\" = {serial} ] || continue; \
               for block in $place/*:*/host*/target*/*/block/*; do \
                 [ -b /dev/${{block##*/}} ] && [ \"$(cat $block/size)\" != 0 ] && echo /dev/${{block##*/}} && exit; \
               done; done; usleep 20000; done"
        );
        let disk = self.run_within(&script, DISK_WITHIN);
        let disk = disk.with_context(|| {
            let (name, stick) = (self.name(), stick.device.name());
            format!("{name} does not see {stick}; asked what it does see: {}", self.all_it_sees())
        })?;
        progress(&format!("{} has {} as {disk}", self.name(), stick.device.name()));
        Ok(disk)
    }

    /// The devices the guest has and the last it said about them; that it does not answer, if so.
    fn all_it_sees(&self) -> String {
        let script =
            "grep -s . /sys/bus/usb/devices/*/product /sys/bus/usb/devices/*/serial; dmesg | tail -n 8";
        self.run_within(script, ASK_WITHIN).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Whether a device with this stick's serial number is there now.
    pub fn has(&self, stick: &Plugged) -> Result<bool> {
        let serial = stick.device.serial_number();
        let script = format!("cat /sys/bus/usb/devices/*/serial 2>/dev/null | grep -cx {serial} || true");
        Ok(self.run(&script)? != "0")
    }

    /// Waits until no device has this stick's serial number any more. The line `USB disconnect` comes before that: the
    /// kernel writes it first and then takes leave of each driver.
    pub fn wait_gone(&self, stick: &Plugged) -> Result<()> {
        let serial = stick.device.serial_number();
        let script = format!(
            "while cat /sys/bus/usb/devices/*/serial 2>/dev/null | grep -qx {serial}; do usleep 20000; done"
        );
        self.run_within(&script, GONE_WITHIN).map(drop)
    }

    /// Whether a device with this `vendor:product` is there now.
    pub fn has_id(&self, id: &str) -> Result<bool> {
        let script = format!("if {}; then echo yes; fi", crate::virtual_devices::is_present(id));
        Ok(self.run(&script)? == "yes")
    }

    /// Reads a whole stick and compares it with what was put on it.
    pub fn check_content(&self, stick: &Plugged) -> Result<()> {
        let disk = self.wait_disk(stick)?;
        let sum = self.sha256_of(&disk, stick.size_bytes())?;
        ensure!(
            sum == stick.sha256(),
            "{} reads {} with SHA-256 {sum}, it is {}",
            self.name(),
            stick.device.name(),
            stick.sha256()
        );
        progress(&format!("{} read {} whole, its checksum is right", self.name(), stick.device.name()));
        Ok(())
    }

    /// Starts to read a whole stick again and again, `rounds` times, and to sum up all of it.
    pub fn start_copy(&self, disk: &str, rounds: u32) -> Result<Copy> {
        let script = format!(
            "for round in $(seq {rounds}); do echo 3 > /proc/sys/vm/drop_caches; \
               dd if={disk} bs=256k iflag=direct 2>/dev/null || exit 1; \
             done | sha256sum | cut -d' ' -f1"
        );
        // Without pipefail a failed read would only shorten the sum.
        let process = self.remote().spawn(&["sh", "-c", &format!("set -o pipefail; {script}")])?;
        Ok(Copy { process })
    }

    /// Waits until the guest has read at least so much from a disk since it came.
    pub fn wait_read_from(&self, disk: &str, bytes: u64) -> Result<()> {
        let name = disk.trim_start_matches("/dev/");
        let sectors = bytes / 512;
        let script = format!(
            "until [ $(awk '{{print $3}}' /sys/block/{name}/stat) -ge {sectors} ]; do usleep 10000; done"
        );
        self.run_within(&script, Duration::from_secs(180)).map(drop)
    }
}
