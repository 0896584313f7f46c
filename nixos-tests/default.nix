# NOT RUN: there was no machine with Nix to try this on. To run it:
#
#   nix-build nixos-tests
#
# A NixOS host with a USB stick of QEMU's, which goes to the controller of a VM without a VMM.
# The whole way into a guest is shown on Debian by vm-tests.
{
  pkgs ? import <nixpkgs> { },
}:

pkgs.testers.runNixOSTest {
  name = "usbpolicyd";

  nodes.host = {
    imports = [ ../packaging/nixos/module.nix ];
    virtualisation.qemu.options = [
      "-device qemu-xhci"
      "-drive if=none,id=stick,file=/dev/zero,format=raw,readonly=on"
      "-device usb-storage,drive=stick"
    ];
    services.usbpolicyd = {
      enable = true;
      policy = {
        vms.work = { };
        assign = [
          {
            vm = "work";
            match.id = "46f4:0001";
          }
        ];
      };
      instances.work = { };
    };
  };

  testScript = ''
    host.wait_for_unit("usbpolicyd.service")
    host.wait_for_unit("usbvfiod@work.socket")
    host.wait_for_unit("usbvfiod@work.service")
    host.succeed("usbpolicyctl check")
    host.wait_until_succeeds("usbpolicyctl list | grep 'with work'")
    owners = host.succeed("stat --format %U /dev/bus/usb/*/*").split()
    assert set(owners) == {"usbpolicyd"}, owners

    host.succeed("systemctl kill --signal KILL usbpolicyd")
    host.wait_until_succeeds("usbpolicyctl list | grep 'with work'")

    host.succeed("systemctl stop usbvfiod@work.service")
    host.wait_until_succeeds("usbpolicyctl list | grep 'for work, which does not run'")
  '';
}
