//! Small helpers over the XML tree that is rewritten.

use mainstay_provider::SiteError;
use roxmltree::{Document, Node};
use xmltree::{Element, XMLNode};

use crate::error::failed;

/// Deeper than any description that libvirt itself reads (its parser stops at 256), and far from what overflows a stack.
const DEPTH_MAX: usize = 256;

pub(super) fn parse(xml: &str) -> Result<Element, SiteError> {
    let reading = |what: &dyn std::fmt::Display| failed(format!("reading a VM's definition: {what}"));
    // It may have been written by another host. The tree that is rewritten is made and dropped by recursion, this one is not.
    let document = Document::parse(xml).map_err(|error| reading(&error))?;
    if is_deeper(document.root_element(), DEPTH_MAX) {
        return Err(reading(&format!("elements lie more than {DEPTH_MAX} deep")));
    }
    Element::parse(xml.as_bytes()).map_err(|error| reading(&error))
}

fn is_deeper(root: Node<'_, '_>, depth_max: usize) -> bool {
    let (mut node, mut depth) = (root, 1);
    loop {
        if let Some(child) = node.first_element_child() {
            (node, depth) = (child, depth + 1);
            if depth > depth_max {
                return true;
            }
            continue;
        }
        loop {
            if node == root {
                return false;
            }
            if let Some(next) = node.next_sibling_element() {
                node = next;
                break;
            }
            let Some(parent) = node.parent() else { return false };
            (node, depth) = (parent, depth - 1);
        }
    }
}

pub(super) fn to_text(element: &Element) -> Result<String, SiteError> {
    let writing = |what: &dyn std::fmt::Display| failed(format!("writing a VM's definition: {what}"));
    let mut bytes = Vec::new();
    element.write(&mut bytes).map_err(|error| writing(&error))?;
    let text = escape_blanks(&String::from_utf8(bytes).map_err(|error| writing(&error))?);
    // A name with a character that XML cannot hold makes a text that is none.
    Document::parse(&text).map_err(|error| writing(&error))?;
    Ok(text)
}

/// Writes blanks as references where they would be read as others and the writer has left them: a carriage return in a text
/// (read as a line feed), a tab in an attribute (read as a space).
fn escape_blanks(text: &str) -> String {
    let (mut out, mut is_in_tag) = (String::with_capacity(text.len()), false);
    for (at, c) in text.char_indices() {
        match c {
            // Not within comments and CDATA, where a reference would be text. The writer has escaped all other `<` and `>`.
            '<' => is_in_tag = !text[at..].starts_with("<!"),
            '>' => is_in_tag = false,
            _ => {}
        }
        match c {
            '\t' if is_in_tag => out.push_str("&#9;"),
            '\r' => out.push_str("&#13;"),
            c => out.push(c),
        }
    }
    out
}

/// An element with attributes.
pub(super) fn element(name: &str, attributes: &[(&str, &str)]) -> Element {
    let mut element = Element::new(name);
    for (key, value) in attributes {
        element.attributes.insert((*key).to_owned(), (*value).to_owned());
    }
    element
}

pub(super) fn push(parent: &mut Element, child: Element) {
    parent.children.push(XMLNode::Element(child));
}

pub(super) fn with(mut parent: Element, child: Element) -> Element {
    push(&mut parent, child);
    parent
}

/// The child of that name, made if there is none.
pub(super) fn child<'a>(parent: &'a mut Element, name: &str) -> &'a mut Element {
    let is_it = |node: &XMLNode| node.as_element().is_some_and(|child| child.name == name);
    let index = match parent.children.iter().position(is_it) {
        Some(index) => index,
        None => {
            parent.children.push(XMLNode::Element(Element::new(name)));
            parent.children.len() - 1
        }
    };
    match &mut parent.children[index] {
        XMLNode::Element(child) => child,
        // The index was found, or pushed, as an element.
        _ => unreachable!("the node at the index is an element"),
    }
}

pub(super) fn set_text(element: &mut Element, text: &str) {
    element.children = vec![XMLNode::Text(text.to_owned())];
}

/// Removes all children of these names.
pub(super) fn remove(parent: &mut Element, names: &[&str]) {
    parent
        .children
        .retain(|node| node.as_element().is_none_or(|child| !names.contains(&child.name.as_str())));
}

/// Keeps the element children for which `keep` answers yes; it may change them.
pub(super) fn retain(parent: &mut Element, mut keep: impl FnMut(&mut Element) -> bool) {
    parent.children.retain_mut(|node| match node {
        XMLNode::Element(child) => keep(child),
        _ => true,
    });
}

pub(super) fn attribute<'a>(element: &'a Element, child: &str, name: &str) -> Option<&'a str> {
    element.get_child(child)?.attributes.get(name).map(String::as_str)
}
