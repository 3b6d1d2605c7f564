//! Names and descriptions that want to be more than text.

use mainstay_model::VmId;
use mainstay_provider::{MacPolicy, NicPlan, SiteError};
use proptest::prelude::*;
use roxmltree::Document;

use super::{Adaptation, DiskSource, NicRules, adapt};

/// A text as it would be written into a description.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '<' | '>' | '&' | '\'' | '"' | '\n' | '\r' | '\t' => {
                out.push_str(&format!("&#{};", u32::from(c)));
            }
            c => out.push(c),
        }
        out
    })
}

/// The characters that XML 1.0 can hold.
fn is_xml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// Adapts a definition with this text wherever a host or a person may have put one.
fn adapted(text: &str) -> Result<String, SiteError> {
    let inside = escaped(text);
    let source = format!(
        "<domain type='kvm'><name>{inside}</name><uuid>0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77</uuid><title>{inside}</title>
        <metadata><x:app xmlns:x='urn:x' y='{inside}'>{inside}</x:app></metadata><memory unit='GiB'>4</memory><vcpu>4</vcpu>
        <os><type machine='pc-q35-10.0'>hvm</type><nvram>{inside}</nvram></os>
        <devices><disk type='file' device='disk'><source file='{inside}'/><target dev='vda'/><serial>{inside}</serial></disk>
        <interface type='bridge'><mac address='52:54:00:aa:00:01'/><source bridge='{inside}'/></interface></devices></domain>"
    );
    let id = VmId(uuid::Uuid::from_u128(7));
    let disks = [DiskSource::Recovery {
        key: "vda".to_owned(),
        top: format!("/top{text}").into(),
        middle: format!("/middle{text}").into(),
        socket: format!("/socket{text}").into(),
        export: text.to_owned(),
    }];
    let plans = [NicPlan {
        mac: "52:54:00:aa:00:01".to_owned(),
        network: Some(format!("bridge:{text}")),
        mac_policy: MacPolicy::Keep,
        address: None,
    }];
    let to = Adaptation {
        id,
        name: text,
        mark: None,
        vcpus: None,
        memory_bytes: None,
        disks: &disks,
        nics: Some(NicRules { vm: id, plans: &plans, isolated: None }),
        has_hardware: true,
        machines: &[],
        nvram: Some(format!("/nvram{text}").into()),
        tpm: None,
    };
    adapt(&source, &to)
}

/// All of a document: elements with their attributes, and texts.
fn parts(xml: &str) -> Vec<String> {
    let document = Document::parse(xml).unwrap();
    let mut parts = Vec::new();
    for node in document.descendants() {
        if node.is_element() {
            parts.push(format!("<{:?}", node.tag_name()));
            let mut attributes: Vec<_> =
                node.attributes().map(|one| format!("{}={}", one.name(), one.value())).collect();
            attributes.sort();
            parts.extend(attributes);
        } else if let Some(text) = node.text().filter(|text| !text.trim().is_empty()) {
            parts.push(text.to_owned());
        }
    }
    parts
}

/// Where the text stands in an ordinary document.
const PLAIN: &str = "plain-text";

fn comes_back_whole(text: &str) {
    let expected: Vec<String> =
        parts(&adapted(PLAIN).unwrap()).into_iter().map(|part| part.replace(PLAIN, text)).collect();
    assert!(expected.iter().filter(|part| part.contains(text)).count() >= 10);
    assert_eq!(parts(&adapted(text).unwrap()), expected, "{text:?}");
}

proptest! {
    #[test]
    fn whatever_a_name_is_it_is_only_text(text in "[<>&'\"/=\\]\\[!? \\-a-z\u{e4}\u{202e}\u{1f600};#]{1,40}") {
        prop_assume!(!text.trim().is_empty() && text.trim() == text);
        comes_back_whole(&text);
    }

    #[test]
    fn no_text_becomes_another(text in any::<String>()) {
        prop_assume!(!text.trim().is_empty() && text.trim() == text);
        if text.chars().all(is_xml) {
            comes_back_whole(&text);
        } else {
            // A description that cannot say it is not made.
            prop_assert!(adapted(&text).is_err());
        }
    }
}

#[test]
fn known_tricks_are_only_text() {
    for text in [
        "</name><devices/><name>",
        "x'/><source file='/etc/shadow",
        "\"/><emulator>/bin/sh</emulator><x y=\"",
        "]]>",
        "<![CDATA[x]]>",
        "<!--",
        "&lt;",
        "&amp;amp;",
        "&#x3c;script/&#62;",
        "&undefined;",
        "<?xml version='1.0'?>",
        "a\nb",
        "a\r\nb",
        "a\tb",
    ] {
        comes_back_whole(text);
    }
    for text in ["a\0b", "a\u{1b}[2Jb", "a\u{ffff}b"] {
        assert!(adapted(text).is_err(), "{text:?}");
    }
}

#[test]
fn bombs_are_refused() {
    let to = |xml: &str| {
        let to = Adaptation {
            id: VmId(uuid::Uuid::from_u128(7)),
            name: "x",
            mark: None,
            vcpus: None,
            memory_bytes: None,
            disks: &[],
            nics: None,
            has_hardware: true,
            machines: &[],
            nvram: None,
            tpm: None,
        };
        adapt(xml, &to)
    };
    assert!(to("<domain><os><type/></os><devices/></domain>").is_ok());
    let entities =
        "<!DOCTYPE domain [<!ENTITY a 'x'><!ENTITY b '&a;&a;'>]><domain><title>&b;</title></domain>";
    assert!(to(entities).is_err());
    let outside =
        "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domain><title>&a;</title></domain>";
    assert!(to(outside).is_err());
    for depth in [300, 200_000] {
        let deep = format!("<domain>{}{}</domain>", "<a>".repeat(depth), "</a>".repeat(depth));
        let refused = to(&deep).unwrap_err();
        assert!(refused.message.contains("deep") || refused.message.contains("reading"), "{refused}");
    }
    assert!(to("<domain><name>x</name>").is_err());
    assert!(to("<network/>").is_err());
}
