//! Everything that `/api/v1` offers, as one table: requests are dispatched by it, roles are asked for by it, and the OpenAPI
//! document is made from it, so that none of them can forget what another knows.

use hyper::{Method, StatusCode};
use mainstay_api::{
    arm::List,
    v1::{
        AuditEntry, Console, ItemScrub, ItemStatus, JobStatus, RegisterAnswer, RegisterRequest,
        RegistrationKey, ServicePrincipal, ServicePrincipalRequest, Token, TokenRequest, Vault,
    },
};
use mainstay_control::app::Role;
use schemars::{JsonSchema, Schema, SchemaGenerator};

/// What needs no sign-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenRoute {
    Document,
    Register,
}

/// What needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignedRoute {
    Vault,
    Vaults,
    CreateRegistrationKey,
    Item,
    ItemConsole,
    ItemScrub,
    RequestScrub,
    Scrubs,
    Job,
    Tokens,
    CreateToken,
    RevokeToken,
    ServicePrincipals,
    CreateServicePrincipal,
    RemoveServicePrincipal,
    Audit,
}

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Open(OpenRoute),
    Signed(Role, SignedRoute),
}

/// How a body looks: makes its schema in a generator.
pub(super) type Shape = fn(&mut SchemaGenerator) -> Schema;

fn shape<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({ "type": "object" })
}

/// One method of one path.
pub(super) struct Operation {
    pub(super) method: Method,
    /// Below `/api/v1`; parameters in braces.
    pub(super) path: &'static str,
    pub(super) route: Route,
    /// Its name for generated clients.
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    pub(super) request: Option<Shape>,
    /// `None`: 204 without a body.
    pub(super) answer: Option<Shape>,
    /// Errors besides those that every request can meet.
    pub(super) errors: &'static [StatusCode],
}

impl Operation {
    /// Whether it is about a vault, which a parameter of the query names.
    pub(super) fn is_in_vault(&self) -> bool {
        use SignedRoute::{
            CreateRegistrationKey, Item, ItemConsole, ItemScrub, Job, RequestScrub, Scrubs, Vault,
        };
        matches!(
            self.route,
            Route::Signed(
                _,
                CreateRegistrationKey | Item | ItemConsole | ItemScrub | RequestScrub | Scrubs | Job | Vault
            )
        )
    }

    /// Names of the parameters in the path.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &'static str> {
        self.path.split('/').filter_map(parameter)
    }

    fn matches(&self, path: &[&str]) -> bool {
        let template = || self.path.split('/').filter(|segment| !segment.is_empty());
        template().count() == path.len()
            && template()
                .zip(path)
                .all(|(known, found)| parameter(known).is_some() || known.eq_ignore_ascii_case(found))
    }
}

fn parameter(segment: &str) -> Option<&str> {
    segment.strip_prefix('{')?.strip_suffix('}')
}

const fn signed(role: Role, route: SignedRoute) -> Route {
    Route::Signed(role, route)
}

const UNKNOWN: &[StatusCode] = &[StatusCode::NOT_FOUND];

/// All of them.
pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        method: Method::GET,
        path: "/openapi.json",
        route: Route::Open(OpenRoute::Document),
        name: "getDocument",
        summary: "This document.",
        request: None,
        answer: Some(any_object),
        errors: &[],
    },
    Operation {
        method: Method::GET,
        path: "/vault",
        route: signed(Role::Reader, SignedRoute::Vault),
        name: "getVault",
        summary: "Where the ARM resources of a vault are.",
        request: None,
        answer: Some(shape::<Vault>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/vaults",
        route: signed(Role::Reader, SignedRoute::Vaults),
        name: "listVaults",
        summary: "All vaults of the server; the first one is meant where a request names none.",
        request: None,
        answer: Some(shape::<List<Vault>>),
        errors: &[],
    },
    Operation {
        method: Method::POST,
        path: "/fabrics/{fabric}/registrationKeys",
        route: signed(Role::Contributor, SignedRoute::CreateRegistrationKey),
        name: "createRegistrationKey",
        summary: "Makes a key that registers hosts in a fabric for five days.",
        request: None,
        answer: Some(shape::<RegistrationKey>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::POST,
        path: "/register",
        route: Route::Open(OpenRoute::Register),
        name: "registerHost",
        summary: "Exchanges a registration key for a host's certificate.",
        request: Some(shape::<RegisterRequest>),
        answer: Some(shape::<RegisterAnswer>),
        errors: &[StatusCode::UNAUTHORIZED, StatusCode::TOO_MANY_REQUESTS],
    },
    Operation {
        method: Method::GET,
        path: "/items/{item}",
        route: signed(Role::Reader, SignedRoute::Item),
        name: "getItem",
        summary: "What ARM has no field for in a replicated item; the item by its name or id.",
        request: None,
        answer: Some(shape::<ItemStatus>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/items/{item}/console",
        route: signed(Role::Reader, SignedRoute::ItemConsole),
        name: "getItemConsole",
        summary: "The command that reaches the console of an item's active copy, on its host.",
        request: None,
        answer: Some(shape::<Console>),
        errors: &[StatusCode::NOT_FOUND, StatusCode::CONFLICT, StatusCode::SERVICE_UNAVAILABLE],
    },
    Operation {
        method: Method::GET,
        path: "/items/{item}/scrub",
        route: signed(Role::Reader, SignedRoute::ItemScrub),
        name: "getItemScrub",
        summary: "What was found when the item's replica was last read through.",
        request: None,
        answer: Some(shape::<ItemScrub>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::POST,
        path: "/items/{item}/scrub",
        route: signed(Role::Operator, SignedRoute::RequestScrub),
        name: "scrubItem",
        summary: "Has the item's replica read through and verified before its turn.",
        request: None,
        answer: Some(shape::<ItemScrub>),
        errors: &[StatusCode::NOT_FOUND, StatusCode::CONFLICT],
    },
    Operation {
        method: Method::GET,
        path: "/scrubs",
        route: signed(Role::Reader, SignedRoute::Scrubs),
        name: "listScrubs",
        summary: "What was found when the replicas of all items were last read through.",
        request: None,
        answer: Some(shape::<List<ItemScrub>>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/jobs/{job}",
        route: signed(Role::Reader, SignedRoute::Job),
        name: "getJob",
        summary: "What ARM has no field for in a job: attempts, outputs and progress of its tasks.",
        request: None,
        answer: Some(shape::<JobStatus>),
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/tokens",
        route: signed(Role::Reader, SignedRoute::Tokens),
        name: "listTokens",
        summary: "The tokens, without their secrets.",
        request: None,
        answer: Some(shape::<List<Token>>),
        errors: &[],
    },
    Operation {
        method: Method::POST,
        path: "/tokens",
        route: signed(Role::Contributor, SignedRoute::CreateToken),
        name: "createToken",
        summary: "Makes a token. The answer is the only one with the secret.",
        request: Some(shape::<TokenRequest>),
        answer: Some(shape::<Token>),
        errors: &[],
    },
    Operation {
        method: Method::DELETE,
        path: "/tokens/{digest}",
        route: signed(Role::Contributor, SignedRoute::RevokeToken),
        name: "revokeToken",
        summary: "Revokes a token, at once.",
        request: None,
        answer: None,
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/servicePrincipals",
        // Who can sign in, and as what, is nobody else's business.
        route: signed(Role::Contributor, SignedRoute::ServicePrincipals),
        name: "listServicePrincipals",
        summary: "The service principals, without their secrets.",
        request: None,
        answer: Some(shape::<List<ServicePrincipal>>),
        errors: &[],
    },
    Operation {
        method: Method::POST,
        path: "/servicePrincipals",
        route: signed(Role::Contributor, SignedRoute::CreateServicePrincipal),
        name: "createServicePrincipal",
        summary: "Makes a service principal. The answer is the only one with the secret.",
        request: Some(shape::<ServicePrincipalRequest>),
        answer: Some(shape::<ServicePrincipal>),
        errors: &[],
    },
    Operation {
        method: Method::DELETE,
        path: "/servicePrincipals/{clientId}",
        route: signed(Role::Contributor, SignedRoute::RemoveServicePrincipal),
        name: "removeServicePrincipal",
        summary: "Removes a service principal, at once, with all access tokens it was given.",
        request: None,
        answer: None,
        errors: UNKNOWN,
    },
    Operation {
        method: Method::GET,
        path: "/audit",
        route: signed(Role::Reader, SignedRoute::Audit),
        name: "listAudit",
        summary: "The newest entries of the audit trail, newest first.",
        request: None,
        answer: Some(shape::<List<AuditEntry>>),
        errors: &[],
    },
];

/// What a request is about.
pub(super) enum Found {
    Operation(&'static Operation),
    /// The path is known, but not with this method.
    OtherMethods(Vec<&'static Method>),
    Nothing,
}

/// Finds a request's operation; the path below `/api/v1`, without regard to case.
pub(super) fn find(method: &Method, path: &[&str]) -> Found {
    let here: Vec<&Operation> = OPERATIONS.iter().filter(|operation| operation.matches(path)).collect();
    match here.iter().find(|operation| operation.method == *method) {
        Some(operation) => Found::Operation(operation),
        None if here.is_empty() => Found::Nothing,
        None => Found::OtherMethods(here.iter().map(|operation| &operation.method).collect()),
    }
}

/// The role that a request needs. What is not there needs the least, so that whoever is let in learns that it is not there.
pub(super) fn required_role(method: &Method, path: &[&str]) -> Role {
    match find(method, path) {
        Found::Operation(Operation { route: Route::Signed(role, _), .. }) => *role,
        _ => Role::Reader,
    }
}
