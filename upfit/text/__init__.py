"""The user's text: from files to documents, and from documents to windows of token ids. One reader for all commands."""

from upfit.text.documents import PYTHON_FILES as PYTHON_FILES
from upfit.text.documents import Document as Document
from upfit.text.documents import library_documents as library_documents
from upfit.text.documents import python_documents as python_documents
from upfit.text.files import find_files as find_files
from upfit.text.plain import read_blocks as read_blocks
from upfit.text.sample import file_documents as file_documents
from upfit.text.stamp import content_stamp as content_stamp
