//! The drivers of a stock guest at work, one kind of device after the other, each moving data that is compared.
//! Several devices share a host and a guest: what they cost is mostly the start of those.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vm_tests::clients::numbers::NETWORK_PORT;
use vm_tests::scenarios::Client;
use vm_tests::smart_card::{self, SmartCard};
use vm_tests::virtual_devices::{UsbIpDevice, plug_gadget};
use vm_tests::{
    Controller, Ended, Extra, Guest, Host, HostConfig, Mark, Plugged, Process, UsbDevice, Usbpolicyd,
    Usbvfiod, devices, on_each_client, progress, scenario,
};

/// Everything in this file goes to vm1.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = ["46f4:*", "1209:*", "1d6b:0105", "1d6b:0106", "08e6:4433", "0627:0001"] }
"#;

/// What moves megabytes through two emulated processors on a busy machine.
const MOVED_WITHIN: Duration = Duration::from_secs(600);

/// What moves little.
const DONE_WITHIN: Duration = Duration::from_secs(120);

on_each_client!(
    disks_bulk_only_and_uas_with_and_without_streams,
    serial_line_echoes_and_network_answers,
    key_speaker_card_phone_and_sleeping_keyboard,
);

fn disks_bulk_only_and_uas_with_and_without_streams(client: Client) -> Result<()> {
    let config = HostConfig::with(&[Controller::Xhci, Controller::Ehci]).extras(&[Extra::Ext4]);
    scenario(&config, |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;

        let stick = host.plug(UsbDevice::stick("stick1").size_mib(32).port("1"))?;
        let disk = Disk::wait(&guest, "46f4:0001")?;
        disk.check("usb-storage", "5000", false)?;
        disk.keep_files_on_ext4()?;
        disk.compare_with(&stick)?;

        let uas = host.plug(UsbDevice::uas("disk1").port("2"))?;
        let disk = Disk::wait(&guest, "46f4:0003")?;
        disk.check("uas", "5000", true)?;
        guest_reads(&disk, &uas)?;
        disk.write_in_parallel()?;
        disk.compare_with(&uas)?;
        host.unplug(&uas)?;
        guest.wait_path(&format!("!{}", disk.place), DONE_WITHIN)?;

        // USB 2 has no streams: UAS works without, one command at a time on the status pipe.
        let uas = host.plug(UsbDevice::uas("disk2").on(Controller::Ehci).port("1"))?;
        let disk = Disk::wait(&guest, "46f4:0003")?;
        disk.check("uas", "480", false)?;
        guest_reads(&disk, &uas)?;
        disk.write_in_parallel()?;
        disk.compare_with(&uas)?;

        // SuperSpeed without streams on the host: UAS is hidden, and the disk works as bulk-only.
        let scripted = UsbIpDevice::plug(host, "disk", &["--speed", "super"])?;
        let disk = Disk::wait(&guest, "1209:0004")?;
        disk.check("usb-storage", "5000", false)?;
        disk.write_in_parallel()?;
        let seen = scripted.statistics()?;
        progress(&format!("scripted disk: {seen}"));
        ensure!(seen["device"]["model"]["is_uas"] == false, "{seen}");
        controller.stop()
    })
}

/// A disk in a guest.
struct Disk<'a> {
    guest: &'a Guest,
    /// Its USB device in sysfs.
    place: String,
    /// Its block device.
    node: String,
}

impl<'a> Disk<'a> {
    /// Waits until the guest has made a disk of the device with this `vendor:product`.
    fn wait(guest: &'a Guest, id: &str) -> Result<Self> {
        let place = place_of(guest, id)?;
        let script = format!(
            "while :; do for block in {place}/*:*/host*/target*/*/block/*; do \
               [ -b /dev/${{block##*/}} ] && [ \"$(cat $block/size)\" != 0 ] && echo /dev/${{block##*/}} && exit; \
             done; usleep 20000; done"
        );
        let node = guest.run_within(&script, DONE_WITHIN).with_context(|| format!("no disk of {id}"))?;
        progress(&format!("the guest has {id} as {node}"));
        Ok(Self { guest, place, node })
    }

    /// Which driver has it, how fast it runs (megabits), and whether the guest's controller has streams set up for it.
    fn check(&self, driver: &str, speed: &str, has_streams: bool) -> Result<()> {
        let Self { guest, place, .. } = self;
        let is = guest.run(&format!("basename $(readlink {place}/*:1.0/driver); cat {place}/speed"))?;
        ensure!(is.lines().eq([driver, speed]), "driver and speed are {is}");
        // One file for each endpoint with streams; devices that are gone have none.
        let streams = guest
            .run("find /sys/kernel/debug/usb/xhci -name stream_id | wc -l")?
            .parse::<u32>()
            .context("number of endpoints with streams")?;
        ensure!((streams > 0) == has_streams, "{streams} endpoints have streams");
        progress(&format!("{driver} at {speed} Mbit/s, {streams} endpoints with streams"));
        Ok(())
    }

    /// Makes a file system, writes files, unmounts, mounts again and compares.
    fn keep_files_on_ext4(&self) -> Result<()> {
        let script = format!(
            "set -e; modprobe -a crc32c_generic ext4; mkfs.ext4 -q -F {node}; mount -t ext4 {node} /mnt; \
             mkdir -p /mnt/a/b; \
             for n in $(seq 40); do dd if=/dev/urandom of=/mnt/a/b/$n bs=$((n * 97)) count=1 2>/dev/null; done; \
             dd if=/dev/urandom of=/mnt/large bs=64k count=96 2>/dev/null; \
             (cd /mnt; find . -type f | sort | xargs sha256sum) > /sums; umount /mnt; \
             echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 {node} /mnt; \
             (cd /mnt; sha256sum -c /sums > /dev/null); umount /mnt; wc -l < /sums",
            node = self.node
        );
        let files = self.guest.run_within(&script, MOVED_WITHIN)?;
        ensure!(files == "41", "{files} files");
        progress("ext4: 41 files written, mounted again and compared");
        Ok(())
    }

    /// Four writers at once, each with a mebibyte of its own, and four readers at once that compare.
    fn write_in_parallel(&self) -> Result<()> {
        let script = format!(
            "for n in 0 1 2 3; do dd if=/dev/urandom of=/part$n bs=64k count=16 2>/dev/null || exit 1; done; \
             all() {{ for n in 0 1 2 3; do $1 $n & jobs=\"$jobs $!\"; done; \
                      for job in $jobs; do wait $job || exit 2; done; jobs=; }}; \
             put() {{ dd if=/part$1 of={node} bs=64k seek=$((64 * $1)) conv=fsync 2>/dev/null; }}; \
             get() {{ dd if={node} bs=64k skip=$((64 * $1)) count=16 iflag=direct 2>/dev/null | cmp - /part$1; }}; \
             all put; echo 3 > /proc/sys/vm/drop_caches; all get; rm /part*",
            node = self.node
        );
        self.guest.run_within(&script, MOVED_WITHIN)?;
        progress("four writers and four readers at once agree");
        Ok(())
    }

    /// What the guest reads is what lies in the medium, on the other side of everything.
    fn compare_with(&self, plugged: &Plugged) -> Result<()> {
        let medium = plugged.medium.as_ref().context("a disk has a medium")?;
        let read = self.guest.sha256_of(&self.node, medium.size_bytes)?;
        ensure!(read == medium.sha256_now()?, "the guest reads {read}, which is not what the medium holds");
        ensure!(read != medium.sha256, "the guest's writes have not reached the medium");
        Ok(())
    }
}

/// The guest reads what the disk was made with.
fn guest_reads(disk: &Disk<'_>, plugged: &Plugged) -> Result<()> {
    let read = disk.guest.sha256_of(&disk.node, plugged.size_bytes())?;
    ensure!(read == plugged.sha256(), "the guest reads {read}, the disk is {}", plugged.sha256());
    Ok(())
}

/// The device with this `vendor:product` in the guest's sysfs, as soon as it is configured.
fn place_of(guest: &Guest, id: &str) -> Result<String> {
    let script = format!(
        "while :; do for place in /sys/bus/usb/devices/*; do \
           [ \"$(cat $place/idVendor 2>/dev/null):$(cat $place/idProduct 2>/dev/null)\" = {id} ] || continue; \
           ls -d $place/*:1.0 >/dev/null 2>&1 && echo $place && exit; \
         done; usleep 20000; done"
    );
    guest.run_within(&script, DONE_WITHIN).with_context(|| format!("the guest does not see {id}"))
}

fn serial_line_echoes_and_network_answers(client: Client) -> Result<()> {
    let config = HostConfig::default().extras(&[Extra::Program("usb-client")]);
    scenario(&config, |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        guest.run("modprobe -a cdc_acm cdc_ncm")?;
        plug_gadget(host, "line", "acm", "high", "")?;
        plug_gadget(host, "net", "ncm", "super", "")?;

        let place = place_of(&guest, "1d6b:0105")?;
        guest.wait_path("/dev/ttyACM0", DONE_WITHIN)?;
        let echo = "exec 3<>/dev/ttyGS0; stty raw -echo <&3; echo ready >&2; exec cat <&3 >&3";
        let echo = host.spawn(&["sh", "-c", echo])?;
        echo.log().wait("ready", DONE_WITHIN)?;
        guest.run("stty -F /dev/ttyACM0 raw -echo")?;
        expect_echo(&guest, 1 << 20)?;
        // With nobody at the line it goes to sleep, and wakes up for the next.
        fall_asleep(&guest, &place)?;
        expect_echo(&guest, 64 << 10)?;
        echo.signal(nix::sys::signal::Signal::SIGTERM)?;

        bring_network_up(host, &guest)?;
        carry(host, &guest)?;
        controller.stop()
    })
}

fn expect_echo(guest: &Guest, bytes: u64) -> Result<()> {
    let moved = report(guest, &format!("echo /dev/ttyACM0 --bytes {bytes}"))?;
    progress(&format!("serial echo: {moved}"));
    ensure!(moved["bytes"] == bytes && moved["wrong"] == 0, "{moved}");
    Ok(())
}

fn bring_network_up(host: &Host, guest: &Guest) -> Result<()> {
    let place = place_of(guest, "1d6b:0106")?;
    let name = "$(cat /sys/kernel/config/usb_gadget/net/functions/ncm.0/ifname)";
    host.run(&format!("ip address add 10.77.0.1/24 dev {name}; ip link set {name} up"))?;
    guest.run_within(
        &format!(
            "until name=$(ls {place}/*:*/net); do usleep 20000; done 2>/dev/null; \
             ip address add 10.77.0.2/24 dev $name; ip link set $name up; \
             until ping -c 1 -W 1 10.77.0.1 > /dev/null; do :; done"
        ),
        DONE_WITHIN,
    )?;
    let pings = guest.run("ping -c 5 -s 1400 -i 0.2 10.77.0.1 | grep loss")?;
    ensure!(pings.contains(" 0% packet loss"), "{pings}");
    progress(&format!("ping: {pings}"));
    Ok(())
}

/// A hundred megabytes to the guest and twenty back, each byte compared.
fn carry(host: &Host, guest: &Guest) -> Result<()> {
    // How long the guest's driver collects packets for one transfer. By default 0.4 ms, in which an emulated processor makes
    // one packet.
    guest.run("echo 20000 | tee /sys/class/net/*/cdc_ncm/tx_timer_usecs")?;
    let address = format!("10.77.0.1:{NETWORK_PORT}");
    for (here, there, bytes) in [("send", "receive", 100_000_000_u64), ("receive", "send", 20_000_000)] {
        let amount = |word: &str| if word == "send" { format!(" --bytes {bytes}") } else { String::new() };
        let server = format!("usb-client {here} {address} --listen{}", amount(here));
        let server = host.spawn(&["sh", "-c", &server])?;
        server.log().wait("listening", DONE_WITHIN)?;
        let of_guest = report(guest, &format!("{there} {address}{}", amount(there)))?;
        let of_host = end_of(&server)?;
        progress(&format!("network: host {here}s {of_host}, guest {there}s {of_guest}"));
        for moved in [&of_host, &of_guest] {
            ensure!(moved["bytes"] == bytes && moved["wrong"] == 0, "{moved}");
        }
    }
    Ok(())
}

/// Runs `usb-client` in a guest and reads its report.
fn report(guest: &Guest, arguments: &str) -> Result<Value> {
    let text = guest.run_within(&format!("usb-client {arguments}"), MOVED_WITHIN)?;
    serde_json::from_str(&text).with_context(|| text)
}

/// The last line of a program that ends well.
fn end_of(process: &Process) -> Result<Value> {
    let ended = process.wait(DONE_WITHIN)?;
    let text = String::from_utf8_lossy(&process.take_stdout()).into_owned();
    ensure!(ended == Ended::Status(0), "{ended:?}: {}", process.log().tail(10));
    let last = text.lines().last().context("no output")?;
    serde_json::from_str(last).with_context(|| text.clone())
}

/// Lets a device be suspended, as a desktop's rules do, and waits until it is.
fn fall_asleep(guest: &Guest, place: &str) -> Result<()> {
    let script = format!(
        "echo 50 > {place}/power/autosuspend_delay_ms; echo auto > {place}/power/control; \
         until grep -qx suspended {place}/power/runtime_status; do usleep 20000; done"
    );
    guest.run_within(&script, DONE_WITHIN).with_context(|| format!("{place} stays awake"))?;
    progress(&format!("{place} is suspended"));
    Ok(())
}

fn key_speaker_card_phone_and_sleeping_keyboard(client: Client) -> Result<()> {
    let config = HostConfig::default().extras(&[Extra::Player, Extra::Program("usb-client")]);
    scenario(&config, |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        guest.run("modprobe snd_usb_audio")?;
        // Nothing is plugged in: the guest's hubs sleep, by its defaults, and every plug below wakes one.
        guest.run_within(
            "until [ $(cat /sys/bus/usb/devices/usb?/power/runtime_status | grep -cx suspended) = 2 ]; \
             do usleep 50000; done",
            DONE_WITHIN,
        )?;
        progress("both root hubs are suspended");

        let card = SmartCard::new()?;
        let key = UsbIpDevice::plug(host, "security-key", &["--speed", "full"])?;
        let speaker = UsbIpDevice::plug(host, "speaker", &["--speed", "full"])?;
        host.plug(UsbDevice::card_reader("reader1", &card.socket()).port("3"))?;
        let phone = host.plug(UsbDevice::phone("phone1", (3 << 20) + 17).port("4"))?;

        let place = place_of(&guest, "1209:0006")?;
        let node = guest.run_within(
            &format!(
                "until node=$(ls -d {place}/*:*/*/hidraw/hidraw*); do usleep 20000; done 2>/dev/null; \
                 echo /dev/${{node##*/}}"
            ),
            DONE_WITHIN,
        )?;
        let echoed = report(&guest, &format!("key {node}"))?;
        let seen = key.statistics()?;
        progress(&format!("security key: {echoed}, {}", seen["device"]["model"]));
        ensure!(seen["device"]["model"]["pings"] == 8, "{seen}");

        place_of(&guest, "08e6:4433")?;
        let report_of_card = report(&guest, "card --id 08e6:4433")?;
        progress(&format!("smart card: {report_of_card}"));
        ensure!(report_of_card["answer"] == devices::hex(smart_card::ANSWER), "{report_of_card}");
        // Present, inactive after the power was taken away.
        ensure!(report_of_card["status"][2] == 1, "{report_of_card}");

        place_of(&guest, "46f4:0004")?;
        let files = report(&guest, "phone --id 46f4:0004")?;
        progress(&format!("phone: {files}"));
        ensure!(files["files"]["phone1.bin"] == phone.sha256(), "the file is {}", phone.sha256());

        play(&guest, &speaker)?;
        type_on_a_sleeping_keyboard(host, &guest)?;
        controller.stop()
    })
}

/// One second at 48 kHz. All of it and the silence behind it fits the buffer of the guest's driver: ALSA gives up (EIO) when
/// a buffer takes more than 1.1 times as long as it should, and emulated processors on a busy machine do take longer.
const SAMPLE_PAIRS: u32 = 48_000;

fn play(guest: &Guest, speaker: &UsbIpDevice) -> Result<()> {
    place_of(guest, "1209:0005")?;
    guest.wait_path("/dev/snd/pcmC0D0p", DONE_WITHIN)?;
    let script = format!(
        "usb-client samples --count {SAMPLE_PAIRS} > /tmp/samples; \
         aplay -q -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000 --period-time=100000 --buffer-time=5000000 /tmp/samples"
    );
    let played = guest.remote().try_run(&script, DONE_WITHIN)?;
    let seen = speaker.statistics()?;
    let heard = &seen["device"]["model"];
    progress(&format!("speaker: {seen}"));
    ensure!(played.status == 0, "{}", played.transcript);
    ensure!(heard["last"] == SAMPLE_PAIRS, "the end was not heard: {heard}");
    for fault in ["missing", "disordered", "torn"] {
        ensure!(heard[fault] == 0, "{fault}: {heard}");
    }
    Ok(())
}

fn type_on_a_sleeping_keyboard(host: &Host, guest: &Guest) -> Result<()> {
    host.plug(UsbDevice::keyboard("keyboard1").port("5"))?;
    let place = place_of(guest, "0627:0001")?;
    guest.wait_line("input: *Keyboard as /", DONE_WITHIN)?;
    fall_asleep(guest, &place)?;
    // Opening it wakes it up.
    let keys = guest.read_keys(Mark::START, 3)?;
    guest.run(&format!("echo on > {place}/power/control; grep -qx active {place}/power/runtime_status"))?;
    host.press(&["a", "b", "ret"])?;
    let expected = [(30, 1), (30, 0), (48, 1), (48, 0), (28, 1), (28, 0)];
    let typed = keys.finish(DONE_WITHIN)?;
    ensure!(typed == expected, "typed {typed:?}");
    progress("a keyboard that had been suspended types");
    Ok(())
}
