//! Drivers that are not Linux's: the firmware of a PC (SeaBIOS) and UEFI firmware (EDK II), each with an xHCI driver of its
//! own, use our controller before any operating system does, and boot from what is plugged in.

use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm_tests::guest::vfio_socket;
use vm_tests::{
    Ended, Host, HostConfig, Plugged, Process, UsbDevice, Usbpolicyd, Usbvfiod, progress, scenario,
};

const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = ["46f4:0001", "0627:0001"] }
"#;

/// Power on until firmware has done what it was asked for; it waits some seconds here and there.
const FIRMWARE_WITHIN: Duration = Duration::from_secs(600);

/// What the boot sector reads: 64 pieces of 32 KiB.
const BOOT_READS_BYTES: usize = 2 << 20;

#[expect(unsafe_code, reason = "the assembler makes the sector; nothing of it runs here")]
mod sector {
    // The first sector of a stick: adds up the first 2 MiB of the stick as words of 32 bits, says the sum on the serial line,
    // waits for a key and says that. The firmware loads it to 0000:7c00 with its number of the drive in DL.
    std::arch::global_asm!(
        r#"
    .pushsection .rodata.boot_sector, "a"
    .code16
    .globl vm_tests_boot_sector
    vm_tests_boot_sector:
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7c00
        cld
        mov cx, 64
        xor ebx, ebx
    boot_read:
        mov si, 0x7de0
        mov ah, 0x42
        int 0x13
        mov al, '!'
        jc boot_end
        add dword ptr [0x7de8], 64
        push ds
        mov ax, 0x1000
        mov ds, ax
        xor si, si
        mov di, 8192
    boot_add:
        lodsd
        add ebx, eax
        dec di
        jnz boot_add
        pop ds
        loop boot_read
        mov al, '='
        call boot_say
        mov cx, 8
    boot_digit:
        rol ebx, 4
        mov al, bl
        and al, 15
        add al, '0'
        cmp al, '9'
        jbe boot_decimal
        add al, 'a' - '9' - 1
    boot_decimal:
        call boot_say
        loop boot_digit
        mov al, 10
        call boot_say
        mov ah, 0
        int 0x16
    boot_end:
        call boot_say
        mov al, 10
        call boot_say
    boot_halt:
        hlt
        jmp boot_halt
    boot_say:
        mov ah, al
        mov dx, 0x3fd
    boot_busy:
        in al, dx
        test al, 0x20
        jz boot_busy
        mov al, ah
        mov dx, 0x3f8
        out dx, al
        ret
        .org vm_tests_boot_sector + 0x1e0   # 64 blocks to 1000:0000; the number of the first
        .byte 16, 0
        .word 64, 0, 0x1000
        .long 0, 0
        .org vm_tests_boot_sector + 510
        .byte 0x55, 0xaa
    .code64
    .popsection
    "#
    );
}

#[expect(unsafe_code, reason = "the sector is made by the assembler")]
fn boot_sector() -> [u8; 512] {
    unsafe extern "C" {
        static vm_tests_boot_sector: [u8; 512];
    }
    // SAFETY: the section above has these bytes, and nobody writes to it.
    unsafe { vm_tests_boot_sector }
}

/// Writes the boot sector to a stick and says what it will find there.
fn make_bootable(stick: &Plugged) -> Result<String> {
    let medium = stick.medium.as_ref().context("a stick has a medium")?;
    let mut file = std::fs::File::options().read(true).write(true).open(&medium.path)?;
    file.write_all(&boot_sector())?;
    file.seek(SeekFrom::Start(0))?;
    let mut start = vec![0; BOOT_READS_BYTES];
    file.read_exact(&mut start)?;
    let (words, _) = start.as_chunks::<4>();
    let sum = words.iter().fold(0_u32, |sum, word| sum.wrapping_add(u32::from_le_bytes(*word)));
    Ok(format!("={sum:08x}"))
}

/// A machine without a kernel of ours: its firmware finds what to boot. What it says on its serial line is its log.
fn power_on(host: &Host, arguments: &[&str]) -> Result<Process> {
    let device = serde_json::json!({
        "driver": "vfio-user-pci", "socket": {"type": "unix", "path": vfio_socket("vm1")},
    });
    let device = device.to_string();
    let mut argv =
        vec!["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"];
    argv.extend(["-machine", "q35,memory-backend=ram,graphics=off", "-m", "256M", "-device", &device]);
    argv.extend(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
    argv.extend(["-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console"]);
    argv.extend(arguments);
    let machine = host.spawn(&argv)?;
    host.keep(machine.log());
    Ok(machine)
}

fn wait_for_vm1(host: &Host, devices: usize) -> Result<()> {
    let count = "usbpolicyctl list | grep -c 'with vm1'";
    host.run(&format!("until [ \"$({count})\" = {devices} ]; do sleep 0.1; done")).map(drop)
}

#[test]
fn seabios_boots_from_a_stick_and_reads_a_key() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let stick = host.plug(UsbDevice::stick("stick1").port("2"))?;
        let sum = make_bootable(&stick)?;
        host.plug(UsbDevice::keyboard("keyboard1").port("3"))?;
        wait_for_vm1(host, 2)?;

        let machine = power_on(host, &["-accel", "kvm", "-cpu", "host"])?;
        let line = machine.log().wait("=*", FIRMWARE_WITHIN)?;
        ensure!(line.text == sum, "the boot sector says {}, not {sum}", line.text);
        progress("the boot sector of the stick read 2 MiB of it");
        host.press(&["k"])?;
        machine.log().wait_after(line.mark, "k", FIRMWARE_WITHIN)?;
        controller.stop()
    })
}

/// Copies a file on the stick, compares the two, and switches off.
const STARTUP_SCRIPT: &str =
    "@echo -off\r\nfs0:\r\ncp one.bin two.bin\r\ncomp one.bin two.bin\r\nreset -s\r\n";

/// With `tcg` below our emulated processor, as QEMU before 9 may die when it emulates KVM and a guest that writes CR8 with
/// an interrupt pending, which the interrupt handler of EDK II does each time.
#[test]
fn uefi_firmware_runs_a_script_from_a_stick_and_writes_to_it() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1").size_mib(64).port("2"))?;
        let name = host.kernel_name(&stick)?;
        let blocks = format!("/sys/bus/usb/devices/{name}/{name}:1.0/host*/target*/*/block/*");
        let disk = host.run(&format!(
            "until block=$(ls -d {blocks}); do sleep 0.1; done 2>/dev/null; echo /dev/${{block##*/}}"
        ))?;
        host.remote().write_file("/run/startup.nsh", STARTUP_SCRIPT.as_bytes())?;
        let sum_of = |file: &str| host.run(&format!("sha256sum < /mnt/{file}"));
        host.run(&format!(
            "mkfs.vfat {disk} && mount -t vfat {disk} /mnt && cp /run/startup.nsh /mnt \
             && dd if=/dev/urandom of=/mnt/one.bin bs=64k count=8"
        ))?;
        let written = sum_of("one.bin")?;
        host.run("umount /mnt")?;

        let policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        wait_for_vm1(host, 1)?;
        let machine = power_on(host, &["-accel", "tcg", "-bios", "/usr/share/ovmf/OVMF.fd"])?;
        machine.log().wait("*no differences encountered*", FIRMWARE_WITHIN)?;
        progress("the firmware found the script and copied a file");
        let ended = machine.wait(FIRMWARE_WITHIN)?;
        ensure!(ended == Ended::Status(0), "{ended:?}");
        controller.stop()?;
        policy.stop()?;

        host.run(&format!(
            "until block=$(ls -d {blocks}); do sleep 0.1; done 2>/dev/null; mount -t vfat /dev/${{block##*/}} /mnt"
        ))?;
        ensure!(sum_of("two.bin")? == written, "what the firmware wrote is not what it read");
        host.run("umount /mnt").map(drop)
    })
}
