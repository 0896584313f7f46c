# NOT RUN: there was no machine with Nix to try this on. The units themselves are those of packaging/systemd, which are
# run by vm-tests/tests/scenarios/services.rs on Debian.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.usbpolicyd;
  toml = pkgs.formats.toml { };
in
{
  options.services.usbpolicyd = {
    enable = lib.mkEnableOption "USB devices for virtual machines, by policy";

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package with usbpolicyd, usbvfiod and usbpolicyctl.";
    };

    policy = lib.mkOption {
      type = toml.type;
      default = { };
      example = lib.literalExpression ''
        {
          vms.work = { };
          assign = [ { vm = "work"; match.id = "0781:5581"; } ];
        }
      '';
      description = "The policy, see usbpolicyd.toml(5). It is checked when the system is built.";
    };

    force = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Whether devices may be taken back by their ports, by usbpolicyd-sysfs(8).";
    };

    instances = lib.mkOption {
      type = lib.types.attrsOf (
        lib.types.submodule {
          options = {
            user = lib.mkOption {
              type = lib.types.str;
              default = "root";
              description = "User of the VMM, who owns the vfio-user socket.";
            };
            options = lib.mkOption {
              type = lib.types.listOf lib.types.str;
              default = [ ];
              example = [ "--ports" "4" ];
              description = "More options of usbvfiod(8).";
            };
          };
        }
      );
      default = { };
      description = "One controller for each VM, by the VM's name in the policy (at most 22 characters).";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = lib.mapAttrsToList (name: _: {
      assertion = builtins.match "[a-z0-9][a-z0-9-]{0,21}" name != null;
      message = "services.usbpolicyd.instances.${name}: 1 to 22 characters, a to z, digits and '-'";
    }) cfg.instances;

    environment.systemPackages = [ cfg.package ];
    environment.etc."usbpolicyd/policy.toml".source =
      let
        written = toml.generate "policy.toml" ({ schema = 1; } // cfg.policy);
      in
      pkgs.runCommand "checked-policy.toml" { } ''
        ${cfg.package}/bin/usbpolicyctl check ${written} || [ $? = 1 ]
        cp ${written} $out
      '';

    services.udev.packages = [ cfg.package ];

    users.users.usbpolicyd = {
      isSystemUser = true;
      group = "usbpolicyd";
    };
    users.groups = {
      usbpolicyd = { };
      usbpolicy-admin = { };
      usbpolicy-operate = { };
      usbpolicy-view = { };
      usbvfiod = { };
    };

    systemd.packages = [ cfg.package ];
    systemd.tmpfiles.rules = [
      "d /run/usbpolicyd 0755 usbpolicyd usbpolicyd -"
      "d /run/usbvfiod 0755 root root -"
    ];
    systemd.services = {
      usbpolicyd = {
        wantedBy = [ "multi-user.target" ];
        reloadTriggers = [ config.environment.etc."usbpolicyd/policy.toml".source ];
      };
    }
    // lib.mapAttrs' (
      name: instance:
      lib.nameValuePair "usbvfiod@${name}" {
        overrideStrategy = "asDropin";
        wantedBy = [ "multi-user.target" ];
        # VMs keep their controllers over a rebuild of the system.
        restartIfChanged = false;
        environment.USBVFIOD_OPTIONS = lib.concatStringsSep " " instance.options;
      }
    ) cfg.instances;
    systemd.sockets = {
      usbpolicyd-sysfs.wantedBy = lib.optional cfg.force "sockets.target";
    }
    // lib.mapAttrs' (
      name: instance:
      lib.nameValuePair "usbvfiod@${name}" {
        overrideStrategy = "asDropin";
        wantedBy = [ "sockets.target" ];
        socketConfig.SocketUser = instance.user;
      }
    ) cfg.instances;
  };
}
