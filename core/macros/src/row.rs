//! `#[derive(Row)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Field, Fields, FieldsNamed, Ident, Type};

use crate::support::{Mistakes, core_path, is_snake_case, refuse_generics};

/// Longest name of a column, in bytes: databases cut at 63, and indexes are named after columns.
const NAME_BYTES_MAX: usize = 50;

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream, Error> {
    let core = core_path()?;
    let columns = columns_of(fields_of(input)?)?;
    let key = the_key(input, &columns)?;

    let struct_name = &input.ident;
    let (key_name, key_type) = (key.field, key.ty);
    let constants = columns.iter().map(|column| column.constant(&core));
    let normalized = columns.iter().map(|column| column.normalize(&core));
    let entries = columns.iter().filter_map(|column| column.check_entry(key, &core));
    let values = columns.iter().map(|column| column.write(&core));
    let fields = columns.iter().map(|column| column.read(&core));
    let visibility = &input.vis;
    let indexed = columns.iter().enumerate().filter(|(_, column)| column.is_key || column.is_index);
    let indexed = indexed.map(|(place, Column { field, ty, .. })| {
        let docs = format!("The column `{field}`, for conditions on rows.");
        quote! {
            #[doc = #docs]
            #visibility const #field: #core::row::IndexedColumn<Self, #ty> =
                #core::row::IndexedColumn::at(#place);
        }
    });
    let stream_key = key.is_stream.then(|| {
        quote_spanned! {key_type.span()=>
            const STREAM_KEY: ::core::option::Option<fn(&str) -> Self::Key> =
                ::core::option::Option::Some(|id| <#key_type as ::core::convert::From<&str>>::from(id));
        }
    });
    let key_is_present = quote_spanned! {key_type.span()=>
        const _: () = assert!(
            !<#key_type as #core::row::ColumnValue>::NULLABLE,
            "the key of a row is always present: it cannot be an Option"
        );
    };
    Ok(quote! {
        #[automatically_derived]
        impl #core::row::Row for #struct_name {
            type Key = #key_type;

            const COLUMNS: &'static [#core::row::Column] = &[#(#constants),*];

            #stream_key

            fn key(&self) -> Self::Key {
                ::core::clone::Clone::clone(&self.#key_name)
            }

            fn normalize(self) -> ::core::result::Result<Self, #core::row::InvalidValue> {
                let row = Self { #(#normalized),* };
                #(#entries)*
                ::core::result::Result::Ok(row)
            }

            fn into_values(
                self,
            ) -> ::core::result::Result<::std::vec::Vec<#core::row::Value>, #core::row::InvalidValue> {
                ::core::result::Result::Ok(::std::vec![#(#values),*])
            }

            fn from_values(
                values: ::std::vec::Vec<#core::row::Value>,
            ) -> ::core::result::Result<Self, #core::row::InvalidValue> {
                let mut values = #core::row::derived::Values::<Self>::new(values)?;
                ::core::result::Result::Ok(Self { #(#fields),* })
            }
        }

        #[automatically_derived]
        #[allow(dead_code, non_upper_case_globals)]
        impl #struct_name {
            #(#indexed)*
        }

        #key_is_present
    })
}

fn fields_of(input: &DeriveInput) -> Result<&FieldsNamed, Error> {
    refuse_generics(input, "a row")?;
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => Ok(fields),
            _ => Err(Error::new_spanned(
                &input.ident,
                "the fields of a row need names: each is a column",
            )),
        },
        _ => Err(Error::new_spanned(
            &input.ident,
            "a row is a struct with a named field for every column",
        )),
    }
}

/// One field and what its attributes say.
struct Column<'a> {
    field: &'a Ident,
    ty: &'a Type,
    name: String,
    is_key: bool,
    /// The key is the id of the stream.
    is_stream: bool,
    is_index: bool,
    is_json: bool,
}

fn columns_of(fields: &FieldsNamed) -> Result<Vec<Column<'_>>, Error> {
    let mut mistakes = Mistakes::default();
    let mut columns = Vec::new();
    for field in &fields.named {
        match Column::parse(field) {
            Ok(column) => columns.push(column),
            Err(error) => mistakes.add(error),
        }
    }
    mistakes.into_result().map(|()| columns)
}

fn the_key<'a, 'b>(
    input: &DeriveInput,
    columns: &'a [Column<'b>],
) -> Result<&'a Column<'b>, Error> {
    let mut keys = columns.iter().filter(|column| column.is_key);
    let Some(key) = keys.next() else {
        let message = "no field identifies the row: mark one with #[row(key)]";
        return Err(Error::new_spanned(&input.ident, message));
    };
    match keys.next() {
        Some(second) => Err(Error::new_spanned(
            second.field,
            format!(
                "`{}` is the key already: a row has one (join several values into one field)",
                key.name
            ),
        )),
        None => Ok(key),
    }
}

impl<'a> Column<'a> {
    fn parse(field: &'a Field) -> Result<Self, Error> {
        let attributes = &field.attrs;
        let ident = field.ident.as_ref().expect("named fields have names");
        let name = ident.unraw().to_string();
        if let Some(mistake) = name_mistake(&name) {
            return Err(Error::new_spanned(ident, mistake));
        }
        let (field, ty) = (ident, &field.ty);
        let (is_key, is_stream, is_index, is_json) = (false, false, false, false);
        let mut column = Self { field, ty, name, is_key, is_stream, is_index, is_json };
        for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("row")) {
            attribute.parse_nested_meta(|meta| {
                let flag = match () {
                    () if meta.path.is_ident("key") => &mut column.is_key,
                    () if meta.path.is_ident("stream") => {
                        column.is_stream = true;
                        &mut column.is_key
                    }
                    () if meta.path.is_ident("index") => &mut column.is_index,
                    () if meta.path.is_ident("json") => &mut column.is_json,
                    () => return Err(meta.error("expected `key`, `stream`, `index` or `json`")),
                };
                *flag = true;
                Ok(())
            })?;
        }
        match column.contradiction() {
            Some(mistake) => Err(Error::new_spanned(ident, mistake)),
            None => Ok(column),
        }
    }

    fn contradiction(&self) -> Option<&'static str> {
        match (self.is_key, self.is_index, self.is_json) {
            (true, _, true) => Some("a key is compared and cannot be json"),
            (_, true, true) => Some("json cannot be searched by: index a field of its own"),
            (true, true, _) => Some("the key is indexed already: remove `index`"),
            _ => None,
        }
    }

    fn constant(&self, core: &TokenStream) -> TokenStream {
        let name = &self.name;
        let role = match (self.is_key, self.is_index) {
            (true, _) => quote!(Key),
            (_, true) => quote!(Index),
            _ => quote!(Plain),
        };
        let (kind, nullable) = if self.is_json {
            (quote!(#core::row::ColumnKind::Json), quote!(false))
        } else {
            (self.in_trait(core, "KIND"), self.in_trait(core, "NULLABLE"))
        };
        quote! {
            #core::row::Column {
                name: #name,
                kind: #kind,
                nullable: #nullable,
                role: #core::row::ColumnRole::#role,
            }
        }
    }

    fn normalize(&self, core: &TokenStream) -> TokenStream {
        let (field, name) = (self.field, &self.name);
        if self.is_json {
            quote!(#field: #core::row::derived::normalize_json(#name, &self.#field)?)
        } else {
            let normalize = self.in_trait(core, "normalize");
            quote!(#field: #core::row::derived::named(#name, #normalize(self.#field))?)
        }
    }

    /// Checks the length of an index entry. An index holds its column and the key.
    fn check_entry(&self, key: &Column<'_>, core: &TokenStream) -> Option<TokenStream> {
        let (field, name) = (self.field, &self.name);
        let text = self.in_trait(core, "text");
        let key = match (self.is_key, self.is_index) {
            (true, _) => quote!(::core::option::Option::None),
            (_, true) => {
                let (key_field, key_text) = (key.field, key.in_trait(core, "text"));
                quote!(#key_text(&row.#key_field))
            }
            _ => return None,
        };
        Some(quote!(#core::row::derived::check_index_entry(#name, #text(&row.#field), #key)?;))
    }

    fn write(&self, core: &TokenStream) -> TokenStream {
        let (field, name) = (self.field, &self.name);
        if self.is_json {
            quote!(#core::row::derived::into_json(#name, &self.#field)?)
        } else {
            let into_value = self.in_trait(core, "into_value");
            quote!(#into_value(self.#field))
        }
    }

    fn read(&self, core: &TokenStream) -> TokenStream {
        let field = self.field;
        let from_value = if self.is_json {
            quote!(#core::row::derived::from_json)
        } else {
            self.in_trait(core, "from_value")
        };
        quote!(#field: values.take(#from_value)?)
    }

    /// An item of `ColumnValue`, spanned so that an unsuitable type is underlined where it stands.
    fn in_trait(&self, core: &TokenStream, item: &str) -> TokenStream {
        let ty = self.ty;
        let item = Ident::new(item, ty.span());
        quote_spanned!(ty.span()=> <#ty as #core::row::ColumnValue>::#item)
    }
}

fn name_mistake(name: &str) -> Option<String> {
    if !is_snake_case(name) {
        return Some("a column's name is [a-z][a-z0-9_]*: rename the field".to_owned());
    }
    if name.len() > NAME_BYTES_MAX {
        let bytes = name.len();
        return Some(format!(
            "a column's name has at most {NAME_BYTES_MAX} bytes, this one has {bytes}"
        ));
    }
    name.starts_with("kafold_").then(|| "columns named kafold_… are the toolkit's own".to_owned())
}
