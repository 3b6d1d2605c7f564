//! Small helpers over the XML tree that is rewritten.

use mainstay_provider::SiteError;
use xmltree::{Element, XMLNode};

use crate::error::failed;

pub(super) fn parse(xml: &str) -> Result<Element, SiteError> {
    Element::parse(xml.as_bytes()).map_err(|error| failed(format!("reading a VM's definition: {error}")))
}

pub(super) fn to_text(element: &Element) -> Result<String, SiteError> {
    let mut bytes = Vec::new();
    element.write(&mut bytes).map_err(|error| failed(format!("writing a VM's definition: {error}")))?;
    String::from_utf8(bytes).map_err(|error| failed(format!("writing a VM's definition: {error}")))
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
