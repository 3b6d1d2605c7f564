//! A rehearsal reaches nothing: shown by packets.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{Arp, HOME, LabAction, LedgerCopy, Mac, RECOVERY, Segment};

use crate::support::{PATIENCE, World};

/// Active VM and test copy have the same address, as always when a copy is booted.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
const STATION: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 99);
const STATION_MAC: Mac = [0x52, 0x54, 0, 0x77, 0, 0x99];

/// A question for this address: each test step asks for one that nobody else asks for.
fn asks_for(last: u8) -> impl Fn(&[u8]) -> bool {
    let address = Ipv4Addr::new(10, 77, 0, last);
    move |frame| Arp::parse(frame).is_some_and(|arp| arp.is_request && arp.to == address)
}

fn answers(frame: &[u8]) -> bool {
    Arp::parse(frame).is_some_and(|arp| !arp.is_request && arp.from == GUEST && arp.to == STATION)
}

/// Has a guest ask who has an address; nobody has.
async fn ask(world: &World, copy: LedgerCopy, last: u8) -> Result<()> {
    let script = format!("arping -c 1 -w 1 -I eth0 10.77.0.{last} || true");
    world.in_guest("vm1", copy, &script).await.map(drop)
}

fn question() -> Arp {
    Arp { is_request: true, mac: STATION_MAC, from: STATION, to: GUEST }
}

/// Everything that was sent before this mark has been received when the mark has.
async fn flush(segment: &Segment, last: u8) -> Result<()> {
    segment.send(&Arp { to: Ipv4Addr::new(10, 77, 0, last), ..question() }.broadcast())?;
    segment.wait_for("the mark", PATIENCE, asks_for(last)).await
}

/// The network that a test copy is on.
async fn network_of_copy(world: &World) -> Result<String> {
    let (site, vm) = world.lab.vm("vm1", LedgerCopy::Test).await?;
    let xml = site.libvirt().xml(vm, mainstay_kvm::libvirt::XmlKind::Live).await?;
    let source = xml.split("<interface type='mcast'>").nth(1).context("a multicast adapter")?;
    let value = |name: &str| {
        let rest = source.split(&format!("{name}='")).nth(2 - usize::from(name == "port"))?;
        rest.split('\'').next()
    };
    Ok(format!("mcast:{}:{}", value("address").context("address")?, value("port").context("port")?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_test_copy_and_production_do_not_hear_each_other() -> Result<()> {
    let mut world = World::up("isolation").await?;
    let vm = world.guest("vm1", "ledger.ip=10.77.0.5/24")?;
    world.add(&vm).await?;
    world
        .cli(&["policy", "create", "often", "--copy-frequency", "5", "--app-consistent-frequency", "0"])
        .expect(0);
    let protect = ["protect", "vm1", "--policy", "often", "--until-protected", "--json"];
    let item = world.cli(&protect).expect(0).says("'vm1' is protected").json()?;
    ensure!(item["properties"]["protectionState"] == "Protected", "{item}");
    let shown = world.cli(&["item", "show", "vm1"]).expect(0);
    for words in ["test network:    isolated", "OperatingSystem, qcow2, ", " MiB, replicated"] {
        ensure!(shown.out.contains(words), "{words} is not in {}", shown.out);
    }
    let production =
        [HOME, RECOVERY].map(|site| world.lab.file().site(site).map(|site| site.network.clone()));
    let [home, recovery] = production;
    let (home, recovery) = (Segment::join(&home?)?, Segment::join(&recovery?)?);

    world.cli(&["test-failover", "vm1"]).expect(0);
    world.lab.ledger("vm1", LedgerCopy::Test, PATIENCE).await?;
    let own = Segment::join(&network_of_copy(&world).await?)?;

    // What the copy sends is on its own network, and on no other.
    ask(&world, LedgerCopy::Test, 201).await?;
    own.wait_for("the copy's packet", PATIENCE, asks_for(201)).await?;
    // What the active VM sends is on its site's production network, and not at the copy's.
    ask(&world, LedgerCopy::Active, 202).await?;
    home.wait_for("the active VM's packet", PATIENCE, asks_for(202)).await?;
    for segment in [&home, &recovery, &own] {
        flush(segment, 203).await?;
    }
    assert!(!home.has_seen(asks_for(201))?, "the copy's packet reached the protected site's network");
    assert!(!recovery.has_seen(asks_for(201))?, "the copy's packet reached the recovery site's network");
    assert!(!own.has_seen(asks_for(202))?, "the active VM's packet reached the copy");

    // The other direction: who asks in production is answered by the active VM, and who asks on the copy's network by
    // the copy. At the recovery site nobody has the address.
    for segment in [&home, &own] {
        segment.send(&question().broadcast())?;
        segment.wait_for("the answer", PATIENCE, answers).await?;
    }
    recovery.send(&question().broadcast())?;
    let received = "cat /sys/class/net/eth0/statistics/rx_packets";
    let before: u64 = world.in_guest("vm1", LedgerCopy::Test, received).await?.parse()?;
    for _ in 0..50 {
        home.send(&question().broadcast())?;
        recovery.send(&question().broadcast())?;
    }
    flush(&home, 204).await?;
    flush(&recovery, 204).await?;
    // Control: one packet on the copy's own network is counted.
    own.send(&Arp { from: Ipv4Addr::new(10, 77, 0, 98), ..question() }.broadcast())?;
    let to_second =
        |frame: &[u8]| Arp::parse(frame).is_some_and(|arp| !arp.is_request && arp.to.octets()[3] == 98);
    own.wait_for("the copy's second answer", PATIENCE, to_second).await?;
    let after: u64 = world.in_guest("vm1", LedgerCopy::Test, received).await?.parse()?;
    assert!(after > before && after < before + 50, "the copy received {} packets", after - before);
    assert!(!recovery.has_seen(answers)?, "somebody answers at the recovery site");

    world.cli(&["cleanup-test-failover", "vm1", "--notes", "isolated"]).expect(0);
    let jobs = world.cli(&["job", "list", "--json"]).expect(0).json()?;
    let cleanup = jobs
        .as_array()
        .context("a list")?
        .iter()
        .find(|job| job["properties"]["scenarioName"] == "TestFailoverCleanup");
    let name = cleanup.and_then(|job| job["name"].as_str()).context("the clean-up's job")?;
    let shown = world.cli(&["job", "show", name]).expect(0);
    ensure!(shown.out.contains("notes:    isolated"), "{}", shown.out);
    on_a_named_network(&mut world).await?;
    world.whole("vm1", HOME).await?;
    // What the state does not allow is refused with what it does allow.
    world.cli(&["commit", "vm1"]).expect(3).says("Allowed now: ").says("TestFailover");
    let told = world.cli(&["complete-failover", "vm1"]).expect(3);
    told.says("no failback of 'vm1' is under way").says("Allowed now: ").says("TestFailover");
    // Also with a point that does not exist, which is not what keeps it from being done.
    let point = "0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77";
    world.cli(&["change-recovery-point", "vm1", "--recovery-point", point]).expect(3).says("Allowed now: ");
    world.cli(&["test-failover", "vm1", "--recovery-point", point]).expect(4).says(point);
    world.proved()
}

/// A rehearsal on a network that the administrator has declared isolated; production networks are refused.
async fn on_a_named_network(world: &mut World) -> Result<()> {
    let port = std::net::UdpSocket::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let isolated = format!("mcast:230.77.83.3:{port}");
    let config = world.lab.dir().join(RECOVERY).join("agent.toml");
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, format!("{text}isolated_networks = [\"{isolated}\"]\n"))?;
    world.lab.act(LabAction::Stop, "agent:recovery").await?;
    world.lab.act(LabAction::Start, "agent:recovery").await?;
    world.lab.wait_connected(RECOVERY).await?;

    let production = world.lab.file().site(RECOVERY)?.network.clone();
    let told = world.cli(&["test-failover", "vm1", "--network", &production]).expect(1);
    told.says("is not an isolated network");
    world.cli(&["test-failover", "vm1", "--network", "mcast:230.77.83.9:9"]).expect(1).says("has no network");
    assert!(world.virsh(RECOVERY, &["list", "--all", "--name"])?.trim().is_empty(), "a copy is left");

    world.cli(&["test-failover", "vm1", "--network", &isolated]).expect(0);
    world.lab.ledger("vm1", LedgerCopy::Test, PATIENCE).await?;
    let segment = Segment::join(&isolated)?;
    ask(world, LedgerCopy::Test, 211).await?;
    segment.wait_for("the copy's packet", PATIENCE, asks_for(211)).await?;
    world.cli(&["cleanup-test-failover", "vm1"]).expect(0);

    // What the item's settings say is used without being said again, and only then.
    world.cli(&["item", "set", "vm1", "--test-network", &isolated]).expect(0);
    let shown = world.cli(&["item", "show", "vm1"]).expect(0);
    ensure!(shown.out.contains(&format!("test network:    {isolated}")), "{}", shown.out);
    world.cli(&["test-failover", "vm1", "--network", &isolated, "--no-network"]).expect(2);
    for (options, is_on_it) in [(&[][..], true), (&["--no-network"][..], false)] {
        world.cli(&[&["test-failover", "vm1"], options].concat()).expect(0);
        world.lab.ledger("vm1", LedgerCopy::Test, PATIENCE).await?;
        let network = network_of_copy(world).await?;
        ensure!((network == isolated) == is_on_it, "the copy of {options:?} is on {network}");
        world.cli(&["cleanup-test-failover", "vm1"]).expect(0);
    }
    world.cli(&["item", "set", "vm1", "--test-network", ""]).expect(0);
    Ok(())
}
